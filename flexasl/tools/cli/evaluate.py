"""`flexasl eval`."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.stored import visible
from flexasl.tools.cli.answering import load
from flexasl.tools.cli.options import (
    MOST_TOKENS,
    ConfigFile,
    Device,
    DtypeName,
    Haystack,
    Model,
    Seed,
    check_lengths,
    path_option,
)
from flexasl.tools.cli.terminal import counted_progress
from flexasl.tools.extras import need

OF_SUITE = "the suite's"


class RankBy(StrEnum):
    policy = "policy"
    question = "question"
    window = "window"


class AfterQuestion(StrEnum):
    rules = "rules"
    rules_30 = "rules-30"
    rules_120 = "rules-120"


def evaluate(
    suite: Annotated[str, typer.Option(help="Which tasks: quick, niah, recall, ruler or infinitebench.")] = "quick",
    tasks: Annotated[str | None, typer.Option(help="Tasks by name, of any suite.", show_default=OF_SUITE)] = None,
    policies: Annotated[
        str, typer.Option(help="What to compare with the full cache, such as asl:tau=0.3,fixed_layer:layer=15,paper.")
    ] = "asl,fixed_layer,snapkv",
    budget: Annotated[
        str | None,
        typer.Option(help="Tokens for the deeper layers: counts or shares, 256,0.25.", show_default=OF_SUITE),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens: 1k,4096.", show_default=OF_SUITE)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts per task and length.", show_default=OF_SUITE)] = None,
    config: ConfigFile = None,
    out: Annotated[
        Path | None, path_option("Folder of results; a stopped run continues.", show_default="out/SUITE")
    ] = None,
    seed: Seed = 0,
    haystack: Haystack = None,
    depths: Annotated[
        str | None, typer.Option(help="Depths of the needle task.", show_default="0,0.25,0.5,0.75,1")
    ] = None,
    qa_file: Annotated[
        list[Path] | None, path_option("SQuAD or HotpotQA as JSON, for qa_1 and qa_2; once each.")
    ] = None,
    infinitebench: Annotated[Path | None, path_option("Folder with InfiniteBench's <task>.jsonl.")] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            max=MOST_TOKENS,
            help="Cut longer answers.",
            show_default="as long as the benchmark has them; in the quick suite, 64",
        ),
    ] = None,
    rank_by: Annotated[
        RankBy,
        typer.Option(
            help="What ranks tokens: the question, the window (the last tokens), or policy: the question under asl and "
            "asl_two_pass, the window under others, paper too."
        ),
    ] = RankBy.policy,
    profile: Annotated[
        bool, typer.Option(help="Fill in settings that are left open from the model's profile, where there is one.")
    ] = True,
    after_question: Annotated[
        AfterQuestion | None,
        typer.Option(
            help="Text after each question: rules for the answer, of some 60, 30 or 120 tokens.",
            show_default="none",
        ),
    ] = None,
    answer_prefix: Annotated[bool, typer.Option(help="End prompts with the start of the answer.")] = True,
    question_first: Annotated[
        bool, typer.Option("--question-first", help="Put the question before the text, not after it.")
    ] = False,
    together: Annotated[
        bool, typer.Option("--together", help="All answers to a prompt at once: much faster, but nothing is timed.")
    ] = False,
    model: Model = None,
    dtype: DtypeName = None,
    device: Device = "cpu",
) -> None:
    """Score policies on long-context tasks against the full cache, and draw accuracy over prefill cost.

    Run the same command again to continue a stopped run. Under torchrun, processes share the prompts.
    """
    need("flexasl eval", "eval", "matplotlib", "numpy", "rouge_score", "wonderwords")
    from flexasl.tools import evaluation
    from flexasl.tools.evaluation import plans, storage

    given = {"depths": plans.parse_depths(depths)} if depths is not None else {}
    plan = evaluation.plan(
        suite,
        tasks=None if tasks is None else plans.parse_names("tasks", tasks),
        lengths=None if lengths is None else check_lengths("--lengths", plans.parse_lengths(lengths)),
        samples=samples,
        policies=plans.parse_policies(policies),
        budgets=None if budget is None else plans.parse_budgets(budget),
        seed=seed,
        answer_tokens=answer_tokens,
        rank_by=rank_by.value,
        profile=profile,
        after_question=None if after_question is None else after_question.value,
        answer_prefix=answer_prefix,
        question_first=question_first,
        config=None if config is None else ASLConfig.load(config),
        sources=evaluation.Sources(
            haystack=haystack, qa_files=tuple(qa_file or ()), infinitebench=infinitebench, **given
        ),
    )
    folder = out or Path("out") / suite
    storage.check_folder("--out", folder)
    rank, world_size = _of_launcher("RANK", 0), _of_launcher("WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise FlexASLError(f"RANK={rank} is not below WORLD_SIZE={world_size}; set both as torchrun does, or neither")
    for name, needs in plan.left_out.items():
        if rank == 0:
            print(f"Left out: {name}, which needs {needs}.", file=sys.stderr)
    if world_size > 1 and device == "cuda":
        device = f"cuda:{_of_launcher('LOCAL_RANK', 0)}"
    loaded, tokenizer = load(model, dtype, device)
    with counted_progress(hidden=rank != 0) as advance:
        done = evaluation.evaluate(
            plan,
            loaded,
            tokenizer,
            folder,
            rank=rank,
            world_size=world_size,
            together=together,
            on_progress=advance,
        )
    if done:  # under torchrun, the last process finds it so
        path = evaluation.report(folder)
        print(visible((folder / "scores.md").read_text(encoding="utf-8").partition("\n\n## ")[0]))
        print(f"\nReport: {path}")


def _of_launcher(name: str, default: int) -> int:
    """A number that torchrun sets in the environment."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise FlexASLError(
            f"the environment has {name}={text}, which is not a number; set it as torchrun does"
        ) from error
