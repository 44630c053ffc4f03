"""Tables and pictures over several folders of `flexasl eval`, such as tasks that were given longer answers than others.

Settings that not every folder has are left out.
"""

from __future__ import annotations

import argparse
from functools import reduce
from pathlib import Path

from flexasl.evaluation import plots
from flexasl.evaluation.runner import ANSWERS, answer_key
from flexasl.evaluation.storage import read_all
from flexasl.evaluation.tables import Results, score_tables

PICTURES = {
    "pareto.png": plots.pareto,
    "needle.png": plots.heat_map,
    "layers.png": plots.chosen_layers,
    "variance.png": plots.variance_curves,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", help="show only these, between semicolons")
    args = parser.parse_args()
    folders = [read_all(folder, ANSWERS, answer_key) for folder in args.folders]
    shown = reduce(set.intersection, ({record["setting"] for record in records} for records in folders))
    if args.settings:
        shown &= set(args.settings.split(";"))
    results = Results(record for records in folders for record in records if record["setting"] in shown)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scores.md").write_text(score_tables(results), encoding="utf-8")
    for name, draw in PICTURES.items():
        if (figure := draw(results)) is not None:
            figure.savefig(args.out / name, dpi=120)


if __name__ == "__main__":
    main()
