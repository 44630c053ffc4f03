"""`flexasl calibrate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.tools.cli.answering import load
from flexasl.tools.cli.options import (
    AMOUNT,
    Device,
    DtypeName,
    Haystack,
    Model,
    Seed,
    amount_of,
    check_lengths,
    path_option,
)
from flexasl.tools.extras import need


def calibrate(
    out: Annotated[
        Path | None,
        path_option(
            "File of settings to write, such as config.json; evidence and profile are written beside it.",
            show_default="none; the profile goes to the user's cache folder, where flexasl finds it",
        ),
    ] = None,
    select_tokens: Annotated[str, typer.Option(help=f"The budget to calibrate for: {AMOUNT}.")] = "256",
    length: Annotated[str, typer.Option(help="Tokens of each prompt: 1536 or 4k.")] = "1536",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks to choose on.", show_default="needle,niah_multikey_1,niah_multivalue,by_meaning,uniform"
        ),
    ] = None,
    unseen: Annotated[str, typer.Option(help="A task to check on alone, or none.")] = "niah_single_2",
    samples: Annotated[
        int, typer.Option(help="Prompts per task that settings are chosen on; half as many others check them.")
    ] = 5,
    seed: Seed = 0,
    haystack: Haystack = None,
    model: Model = None,
    dtype: DtypeName = None,
    device: Device = "cpu",
) -> None:
    """Find the settings that suit a model: layers, stages and thresholds. Takes minutes, without training."""
    need("flexasl calibrate", "eval", "matplotlib", "numpy", "rouge_score", "wonderwords")
    from flexasl import profiles
    from flexasl.tools.calibration import calibrating, evidence
    from flexasl.tools.evaluation import Sources, plans

    if out is not None:
        evidence.check_files("--out", out, (haystack, model))
    config = ASLConfig(select_tokens=amount_of("select_tokens", select_tokens))
    lengths = check_lengths("--length", plans.parse_lengths(length))
    if len(lengths) > 1:
        raise FlexASLError(f"--length {length} is several lengths; give one")
    named = calibrating.TASKS if tasks is None else tuple(plans.parse_names("tasks", tasks))
    last = None if unseen.lower() == "none" else unseen
    calibrating.check_tasks(named, last, samples)
    _check_made_here((*named, *([last] if last else [])))
    if config.token_budget(lengths[0]) >= lengths[0]:
        raise FlexASLError(
            f"select_tokens={config.select_tokens} is not smaller than a prompt of --length {length}; give a smaller "
            "--select-tokens or a greater --length"
        )
    sources = Sources(haystack=haystack)
    loaded, tokenizer = load(model, dtype, device)
    if out is None:
        from flexasl.integrations.transformers.fingerprint import calibrated_for

        profiles.place_for(calibrated_for(loaded))
    about: dict[str, Any] = {"tasks": named, "unseen": last, "samples": samples, "length": lengths[0], "seed": seed}
    made = calibrating.calibrate_visibly(loaded, tokenizer, config=config, sources=sources, **about)
    print(made)
    if out is None:
        print(f"\nProfile: {profiles.store(made.profile())}")
        return
    paths = made.save(out)
    print(f"\nSettings: {paths[0]}\nEvidence: {', '.join(map(str, paths[1:4]))}\nProfile: {paths[4]}")


def _check_made_here(tasks: tuple[str, ...]) -> None:
    """Files of questions are for `flexasl eval` alone."""
    from flexasl.tools.evaluation.tasks import TASKS

    for name in tasks:
        if TASKS[name].needs is not None:
            known = ", ".join(task.name for task in TASKS.values() if task.needs is None)
            raise FlexASLError(
                f"task={name!r} needs a file, which flexasl calibrate does not take; give some of {known}"
            )
