"""Tables and pictures over several folders of `flexasl eval`, such as tasks that were given longer answers than others.

Settings that not every folder has are left out. The answers themselves go into `answers.jsonl.gz`, which may be given
in place of a folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
from functools import reduce
from pathlib import Path
from typing import Any

from flexasl.tools.evaluation import plots
from flexasl.tools.evaluation.records import ANSWERS, check
from flexasl.tools.evaluation.runner import answer_key
from flexasl.tools.evaluation.storage import read_all
from flexasl.tools.evaluation.tables import Results, score_tables

PICTURES = {
    "pareto.png": plots.pareto,
    "needle.png": plots.heat_map,
    "layers.png": plots.chosen_layers,
    "decisions.png": plots.decisions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="of `flexasl eval`, or answers.jsonl.gz of this script")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", help="show only these, between semicolons")
    args = parser.parse_args()
    folders = [_read(folder) for folder in args.folders]
    shown = reduce(set.intersection, ({record["setting"] for record in records} for records in folders))
    if args.settings:
        shown &= set(args.settings.split(";"))
    joined = [record for records in folders for record in records if record["setting"] in shown]
    results = Results(joined)
    args.out.mkdir(parents=True, exist_ok=True)
    _write(args.out / "answers.jsonl.gz", joined)
    (args.out / "scores.md").write_text(score_tables(results), encoding="utf-8")
    for name, draw in PICTURES.items():
        if (figure := draw(results)) is not None:
            figure.savefig(args.out / name, dpi=120)


def _read(place: Path) -> list[dict[str, Any]]:
    if place.is_dir():
        return read_all(place, ANSWERS, answer_key)
    return [check(ANSWERS, json.loads(line)) for line in gzip.decompress(place.read_bytes()).splitlines()]


def _write(place: Path, records: list[dict[str, Any]]) -> None:
    """The same bytes for the same answers, whatever process gave them."""
    lines = sorted(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    place.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


if __name__ == "__main__":
    main()
