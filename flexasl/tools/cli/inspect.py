"""`flexasl inspect`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flexasl.stored import visible
from flexasl.tools.cli.answering import MIB
from flexasl.tools.cli.options import AsJson, path
from flexasl.tools.cli.terminal import progress_bar


def inspect(
    file: Annotated[
        Path, typer.Argument(help="File that flexasl prefill or cache.save wrote.", parser=path, metavar="PATH")
    ],
    as_json: AsJson = False,
) -> None:
    """Check a saved prompt, and say what is in it and which model it belongs to."""
    with progress_bar(f"checking {file}"):
        from flexasl.saving import read

        saved = read(file)
    rows = saved.layers[0].keys.shape[0]
    model = {name: saved.model.get(name) for name in ("architecture", "dtype", "shapes", "weights", "settings")}
    if as_json:
        facts = {"bytes": file.stat().st_size, "version": saved.version, "flexasl": saved.flexasl, "rows": rows}
        facts |= {"tokens": saved.seen, "kv_bytes": saved.nbytes, "has_token_ids": saved.token_ids is not None}
        reports = [report.to_dict() for report in saved.reports]
        print(json.dumps(facts | {"model": model, "notes": saved.notes, "reports": reports}))
        return
    size = f"{file.stat().st_size / MIB:,.1f} MiB"
    print(f"{file}: {size}, intact, format {saved.version}, by flexasl {visible(saved.flexasl)}")
    print(visible(f"model: {model['architecture']}, {model['dtype']}, weights {str(model['weights'])[:12]}"))
    ids = "with" if saved.token_ids is not None else "without"
    print(f"{rows} row{'s' if rows > 1 else ''} of {saved.seen:,} tokens read, {ids} their ids")
    for name, text in saved.notes.items():
        print(f"{visible(name)}: {text!r}")
    for report in saved.reports:
        print(report)
