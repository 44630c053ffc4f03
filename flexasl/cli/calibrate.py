"""`flexasl calibrate`."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from flexasl.cli.answering import load
from flexasl.cli.options import AMOUNT, Device, DtypeName, Model, amount_of, need_extra
from flexasl.cli.terminal import counted_progress
from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError


def calibrate(
    out: Annotated[Path, typer.Option(help="File of settings to write, such as config.json; evidence goes beside it.")],
    select_tokens: Annotated[str, typer.Option(help=f"The budget to calibrate for: {AMOUNT}.")] = "256",
    length: Annotated[str, typer.Option(help="Tokens of each prompt: 1536 or 4k.")] = "1536",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks to choose on. Default: needle,passkey,number_string,niah_multikey_1.")
    ] = None,
    unseen: Annotated[str, typer.Option(help="A task to check on alone, or none.")] = "niah_single_2",
    samples: Annotated[int, typer.Option(help="Prompts per task; the choice is made on every other one.")] = 6,
    seed: Annotated[int, typer.Option(help="Chooses the prompts.")] = 0,
    haystack: Annotated[Path | None, typer.Option(help="Text to hide needles in. Default: English prose.")] = None,
    model: Model = None,
    dtype: DtypeName = None,
    device: Device = "cpu",
) -> None:
    """Find the settings that suit a model: which layers, which threshold. Minutes, and no training."""
    need_extra("calibrate", "matplotlib", "numpy", "rouge_score", "wonderwords")
    from flexasl import calibration
    from flexasl.calibration import calibrating, evidence
    from flexasl.evaluation import Sources, plans
    from flexasl.evaluation import tasks as evaluation_tasks
    from flexasl.evaluation.tasks import find_task

    _check_writable(evidence.files_of(out))
    config = ASLConfig(select_tokens=amount_of("select_tokens", select_tokens))
    lengths = plans.parse_lengths(length)
    if len(lengths) > 1:
        raise FlexASLError(f"--length {length} is several lengths; give one")
    named = calibrating.TASKS if tasks is None else tuple(plans.parse_names("tasks", tasks))
    for name in (*named, *([] if unseen.lower() == "none" else [unseen])):
        if find_task(name).needs:
            generated = ", ".join(task for task, about in evaluation_tasks().items() if not about.needs)
            raise FlexASLError(
                f"task={name!r} is made from files, which calibrate does not take; give some of {generated}"
            )
    sources = Sources(haystack=haystack)
    loaded, tokenizer = load(model, dtype, device)
    with counted_progress(hidden=False) as advance:
        made = calibration.calibrate(
            loaded,
            tokenizer,
            config,
            tasks=named,
            unseen=None if unseen.lower() == "none" else unseen,
            samples=samples,
            length=lengths[0],
            seed=seed,
            sources=sources,
            on_progress=advance,
        )
    paths = made.save(out)
    print(made)
    print(f"\nSettings: {paths[0]}\nEvidence: {', '.join(map(str, paths[1:]))}")


def _check_writable(paths: list[Path]) -> None:
    """Find out before the model runs whether files can be made there."""
    folder = paths[0].parent
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".flexasl-"):
            pass
    except OSError as error:
        raise FlexASLError(f"--out {paths[0]} cannot be written: {os.strerror(error.errno or 0)}") from error
