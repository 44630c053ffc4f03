"""The words on a command line: `flexasl ask`, `prefill`, `inspect`, `demo` and `eval`."""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.policies import POLICIES, find_policy
from flexasl.text import magic_number, needle_prompt, prompt_ids, read_text

# torch and transformers take seconds to import, so `flexasl.run` is imported inside the commands: help must be quick.
if TYPE_CHECKING:
    from flexasl.report import Report
    from flexasl.run import Answer

MIB = 2**20
DEMO_ANSWER_TOKENS = 12
PLOT_FORMATS = (".png", ".svg", ".pdf")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ask about long texts, with the prompt pruned while the model reads it.",
)


class KVDtype(StrEnum):
    int8 = "int8"
    fp8 = "fp8"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str | None, typer.Option(help="Model folder or hub id. [default: the embedded SmolLM2-135M-Instruct]")
]
PolicyName = Annotated[str, typer.Option("--policy", help=f"What to prune and when: {', '.join(POLICIES)}.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")]
DtypeName = Annotated[Dtype | None, typer.Option(help="Number format. [default: that of the stored weights]")]
AMOUNT = "a count of tokens (512) or a share of the prompt (0.25)"
SelectTokens = Annotated[str | None, typer.Option(help=f"Tokens for the deeper layers: {AMOUNT}.")]
KVBudget = Annotated[str | None, typer.Option(help=f"Cache entries kept per KV head: {AMOUNT}. [default: all]")]
KVDtypeName = Annotated[
    KVDtype | None,
    typer.Option("--kv-dtype", help="Keep the cache in eight bits. [default: the model's number format]"),
]
Tau = Annotated[float | None, typer.Option(help="Variance ratio below which ranks have settled, in (0, 1].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
OF_A_PROMPT = ("file", "select_tokens", "kv_budget", "kv_dtype", "tau", "policy", "compare")
"""Options of `ask` that say how a text is read, and so go with --file and not with --cache."""


@app.command()
def ask(
    context: typer.Context,
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about the text.")],
    file: Annotated[str | None, typer.Option("--file", "-f", help="UTF-8 text; standard input if absent or -.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Text read before, by flexasl prefill with this model.")] = None,
    model: Model = None,
    select_tokens: SelectTokens = None,
    kv_budget: KVBudget = None,
    kv_dtype: KVDtypeName = None,
    tau: Tau = None,
    policy: PolicyName = "asl",
    dtype: DtypeName = None,
    device: Device = "cpu",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Picture of the decision to write: .png, .svg or .pdf.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run the model without pruning.")] = False,
) -> None:
    """Answer a question about a text. Streams the answer, then prints what was pruned."""
    if cache is not None:
        _refuse_beside(context, "cache", OF_A_PROMPT)
    config = _config(tau, kv_dtype, select_tokens=select_tokens, kv_budget=kv_budget)
    find_policy(policy)
    _check_plot(plot)
    if not question.strip():
        raise FlexASLError("--question is empty; give a question")
    if cache is not None:
        _ask_saved(cache, question, model, dtype, device, max_new_tokens, plot=plot, as_json=as_json)
        return
    text = _text(file)
    with _progress("loading the model"):
        from flexasl import run

        _quiet_transformers()
        loaded, tokenizer = run.load_model(model, dtype, device)
    ids = run.question_ids(tokenizer, text, question)
    run.check_fits(loaded, len(ids), max_new_tokens)
    if compare:
        with _progress("warming up"):
            run.warm_up(loaded, tokenizer, ids, config=config, policy=policy)
    pruned = _answer(
        loaded, tokenizer, ids, max_new_tokens, policy, config, quiet=as_json, title=policy if compare else ""
    )
    plain = _answer(loaded, tokenizer, ids, max_new_tokens, quiet=as_json, title="unpruned") if compare else None
    assert pruned.report is not None
    if plot is not None:
        _write_plot(pruned.report, plot)
    if as_json:
        print(json.dumps(pruned.to_dict() | ({"unpruned": plain.to_dict()} if plain else {})))
        return
    print(pruned.report)
    if plain is not None:
        _print_comparison(pruned, plain, policy)


@app.command()
def prefill(
    out: Annotated[Path, typer.Option(help="File to write, such as contract.safetensors.")],
    file: Annotated[str | None, typer.Option("--file", "-f", help="UTF-8 text; standard input if absent or -.")] = None,
    about: Annotated[
        str, typer.Option(help="What will be asked, in any words: keeps the tokens that matter to it.")
    ] = "",
    model: Model = None,
    select_tokens: SelectTokens = None,
    kv_budget: KVBudget = None,
    kv_dtype: KVDtypeName = None,
    tau: Tau = None,
    policy: PolicyName = "asl",
    dtype: DtypeName = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Read a text once and save what the model remembers, for flexasl ask --cache."""
    config = _config(tau, kv_dtype, select_tokens=select_tokens, kv_budget=kv_budget)
    find_policy(policy)
    if not out.parent.is_dir():
        raise FlexASLError(f"--out {out} lies in a folder that does not exist; make {out.parent} first")
    text = _text(file)
    with _progress("loading the model"):
        from flexasl import run

        _quiet_transformers()
        loaded, tokenizer = run.load_model(model, dtype, device)
    ids, notes = run.opening_ids(tokenizer, text, about.strip())
    run.check_fits(loaded, len(ids), 1)
    with _progress(f"reading {len(ids):,} tokens", loaded.config.get_text_config().num_hidden_layers) as bar:
        made = run.prefill(loaded, ids, config=config, policy=policy, on_layer=bar.advance)
    with _progress(f"writing {out}"):
        made.save(out, notes=notes | {"source": file or "-", "about": about.strip()})
    size = out.stat().st_size
    if as_json:
        print(json.dumps({"path": str(out), "bytes": size, "report": made.reports[-1].to_dict()}))
        return
    print(made.reports[-1])
    print(f"saved: {out}, {size / MIB:,.1f} MiB")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="File that flexasl prefill or cache.save wrote.")],
    as_json: AsJson = False,
) -> None:
    """Check a saved prompt, and say what is in it and which model it belongs to."""
    with _progress(f"checking {path}"):
        from flexasl.saving import read

        saved = read(path)
    rows = saved.layers[0].keys.shape[0]
    model = {name: saved.model.get(name) for name in ("architecture", "dtype", "shapes", "weights", "settings")}
    if as_json:
        facts = {"bytes": path.stat().st_size, "version": saved.version, "flexasl": saved.flexasl, "rows": rows}
        facts |= {"tokens": saved.seen, "kv_bytes": saved.nbytes, "has_token_ids": saved.token_ids is not None}
        reports = [report.to_dict() for report in saved.reports]
        print(json.dumps(facts | {"model": model, "notes": saved.notes, "reports": reports}))
        return
    print(f"{path}: {path.stat().st_size / MIB:,.1f} MiB, intact, format {saved.version}, by flexasl {saved.flexasl}")
    print(f"model: {model['architecture']}, {model['dtype']}, weights {str(model['weights'])[:12]}")
    ids = "with" if saved.token_ids is not None else "without"
    print(f"{rows} row{'s' if rows > 1 else ''} of {saved.seen:,} tokens read, {ids} their ids")
    for name, text in saved.notes.items():
        print(f"{name}: {text!r}")
    for report in saved.reports:
        print(report)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=256, help="Length of the prompt, in tokens.")] = 4000,
    depth: Annotated[float, typer.Option(min=0, max=1, help="Where the fact is hidden: 0 start, 1 end.")] = 0.4,
    seed: Annotated[int, typer.Option(help="Chooses the fact and the text around it.")] = 0,
    select_tokens: Annotated[str, typer.Option(help=f"Tokens for the deeper layers: {AMOUNT}.")] = "512",
    policy: PolicyName = "asl",
    model: Model = None,
    dtype: DtypeName = None,
    device: Device = "cpu",
) -> None:
    """Hide a fact in a long text, ask for it with and without pruning, and compare.

    Exit status 1 if the pruned answer does not contain the fact.
    """
    config = _config(select_tokens=select_tokens)
    find_policy(policy)
    with _progress("loading the model"):
        from flexasl import run

        _quiet_transformers()
        loaded, tokenizer = run.load_model(model, dtype, device)
    fact = magic_number(seed)
    run.check_fits(loaded, tokens, DEMO_ANSWER_TOKENS)
    message = needle_prompt(
        tokenizer, tokens, depth, fact.needle, fact.question, seed, answer_prefix=fact.answer_prefix
    )
    ids = prompt_ids(tokenizer, message, fact.answer_prefix)
    print(f"Hidden at {depth:.0%} of {len(ids):,} tokens: {fact.needle}\nQuestion: {fact.question}\n")
    with _progress("warming up"):
        run.warm_up(loaded, tokenizer, ids, config=config, policy=policy)
    begin = fact.answer_prefix
    pruned = _answer(loaded, tokenizer, ids, DEMO_ANSWER_TOKENS, policy, config, title=policy, begin=begin)
    plain = _answer(loaded, tokenizer, ids, DEMO_ANSWER_TOKENS, title="unpruned", begin=begin)
    print(pruned.report)
    _print_comparison(pruned, plain, policy)
    if fact.answer not in pruned.text:
        print(f"flexasl: the pruned answer does not contain {fact.answer}", file=sys.stderr)
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    suite: Annotated[str, typer.Option(help="Which tasks: quick, niah, ruler or infinitebench.")] = "quick",
    tasks: Annotated[str | None, typer.Option(help="Tasks by name, of any suite. Default: the suite's.")] = None,
    policies: Annotated[
        str, typer.Option(help="What to compare with the full cache, such as asl:tau=0.3,fixed_layer:layer=15,paper.")
    ] = "asl,fixed_layer,snapkv",
    budget: Annotated[
        str | None,
        typer.Option(help="Tokens for the deeper layers: counts or shares, 256,0.25. Default: the suite's."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens: 1k,4096. Default: the suite's.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Prompts per task and length. Default: the suite's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results, gone on with. Default: out/SUITE.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the prompts.")] = 0,
    haystack: Annotated[Path | None, typer.Option(help="Text to hide needles in. Default: English prose.")] = None,
    depths: Annotated[str | None, typer.Option(help="Depths of the needle task. Default: 0,0.25,0.5,0.75,1.")] = None,
    qa_file: Annotated[
        list[Path] | None, typer.Option(help="SQuAD or HotpotQA as JSON, for qa_1 and qa_2; once each.")
    ] = None,
    infinitebench: Annotated[Path | None, typer.Option(help="Folder with InfiniteBench's <task>.jsonl.")] = None,
    model: Model = None,
    dtype: DtypeName = None,
    device: Device = "cpu",
) -> None:
    """Score policies on long-context tasks against the full cache, and draw accuracy over prefill cost.

    Stopped, the same command goes on where it was. Under torchrun, processes share the prompts.
    """
    _need_eval_extra()
    from flexasl import evaluation
    from flexasl.evaluation import plans

    given = {"depths": plans.parse_depths(depths)} if depths is not None else {}
    plan = evaluation.plan(
        suite,
        tasks=None if tasks is None else plans.parse_names("tasks", tasks),
        lengths=None if lengths is None else plans.parse_lengths(lengths),
        samples=samples,
        policies=plans.parse_policies(policies),
        budgets=None if budget is None else plans.parse_budgets(budget),
        seed=seed,
        sources=evaluation.Sources(
            haystack=haystack, qa_files=tuple(qa_file or ()), infinitebench=infinitebench, **given
        ),
    )
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    for name, needs in plan.left_out.items():
        if rank == 0:
            print(f"Left out: {name}, which needs {needs}.", file=sys.stderr)
    if world_size > 1 and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    with _progress("loading the model"):
        from flexasl import run

        _quiet_transformers()
        loaded, tokenizer = run.load_model(model, dtype, device)
    folder = out or Path("out") / suite
    with _counted_progress(hidden=rank != 0) as advance:
        done = evaluation.evaluate(
            plan, loaded, tokenizer, folder, rank=rank, world_size=world_size, on_progress=advance
        )
    if done:  # under torchrun, the last process finds it so
        path = evaluation.report(folder)
        print((folder / "scores.md").read_text(encoding="utf-8").partition("\n\n## ")[0])
        print(f"\nReport: {path}")


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 1 the demo's answer is wrong, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        status = app(arguments or ["--help"], prog_name="flexasl", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except typer.TyperException as error:
        status = _fail(error.format_message())
    except (FlexASLError, OSError) as error:
        status = _fail(str(error))
    raise SystemExit(status if isinstance(status, int) else 0)


def _fail(message: str) -> int:
    print("flexasl:", " ".join(message.split()), file=sys.stderr)
    return 2


def _config(tau: float | None = None, kv_dtype: Any = None, **amounts: str | None) -> ASLConfig:
    settings: dict[str, Any] = {name: _amount(name, text) for name, text in amounts.items() if text is not None}
    return ASLConfig(tau=tau, kv_dtype=kv_dtype and kv_dtype.value, **settings)


def _amount(name: str, text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise FlexASLError(f"--{name.replace('_', '-')} {text} is no amount; give {AMOUNT}")


def _text(file: str | None) -> str:
    if file is None and sys.stdin.isatty():
        raise FlexASLError("there is no text to read; give --file, or pipe a text in")
    return read_text(file)


def _refuse_beside(context: typer.Context, option: str, others: tuple[str, ...]) -> None:
    """Says so where options were given that another one leaves without effect."""
    for name in others:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise FlexASLError(
                f"--{name.replace('_', '-')} has no effect with --{option}, whose text has been read; leave it out, or "
                "give it to flexasl prefill"
            )


def _ask_saved(
    path: Path,
    question: str,
    model: str | None,
    dtype: str | None,
    device: str,
    max_new_tokens: int,
    *,
    plot: Path | None,
    as_json: bool,
) -> None:
    """`ask` about a text that was read before."""
    with _progress("loading the model"):
        from flexasl import run

        _quiet_transformers()
        loaded, tokenizer = run.load_model(model, dtype, device)
    with _streamed("reading the question", loaded, quiet=as_json) as (show, advance):
        said = run.answer_saved(
            loaded, tokenizer, path, question, max_new_tokens=max_new_tokens, on_text=show, on_layer=advance
        )
    if plot is not None and said.report is not None:
        _write_plot(said.report, plot)
    if as_json:
        print(json.dumps(said.to_dict()))
    elif said.report is not None:
        print(f"{path}, read before:\n{said.report}")


def _answer(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    policy: str | None = None,
    config: ASLConfig | None = None,
    *,
    title: str = "",
    begin: str = "",
    quiet: bool = False,
) -> "Answer":
    """Run once, with a bar over the layers of the prefill, then the answer as it comes."""
    from flexasl import run

    words = f"reading {len(ids):,} tokens"
    with _streamed(words, model, begin=f"{title}: {begin}" if title else begin, quiet=quiet) as (show, advance):
        return run.answer(
            model,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            config=config,
            policy=policy,
            on_text=show,
            on_layer=advance,
        )


@contextmanager
def _streamed(
    words: str, model: Any, *, begin: str = "", quiet: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """What to call with each piece of an answer, which is printed unless quiet, and after each layer before it."""
    with _progress(words, model.config.get_text_config().num_hidden_layers) as bar:

        def show(text: str) -> None:
            nonlocal begin
            if quiet:
                return
            bar.stop()  # it shares the terminal with the answer
            print(begin + text, end="", flush=True)
            begin = ""

        yield show, bar.advance
    if not quiet:
        print("\n", flush=True)


class _Bar:
    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self) -> None:
        self._progress.advance(self._task)

    def stop(self) -> None:
        self._progress.stop()


@contextmanager
def _progress(words: str, total: int | None = None) -> Iterator[_Bar]:
    """A bar on standard error while something takes its time; nothing where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, refresh_per_second=4) as progress:
        yield _Bar(progress, progress.add_task(words, total=total))


@contextmanager
def _counted_progress(hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error with the time left, one for each stage; nothing where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    bars: dict[str, Any] = {}
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=hidden or not console.is_terminal
    ) as progress:

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:  # what an earlier run did says nothing about this one's speed
                bars[stage] = progress.add_task(stage, total=total, completed=done)
            progress.update(bars[stage], completed=done)

        yield advance


def _need_eval_extra() -> None:
    """Find out before the model runs whether the report can be made."""
    for name in ("matplotlib", "numpy", "rouge_score", "wonderwords"):
        if importlib.util.find_spec(name) is None:
            raise FlexASLError(f"flexasl eval needs {name}; install it with: pip install 'flexasl[eval]'")


def _print_comparison(pruned: "Answer", plain: "Answer", policy: str) -> None:
    table = Table("", policy, "unpruned", "share")
    rows: tuple[tuple[str, Callable[[Answer], float], str], ...] = (
        ("time to first token, s", lambda answer: answer.first_token_seconds, ".2f"),
        ("total time, s", lambda answer: answer.total_seconds, ".2f"),
        ("KV cache of the prompt, MiB", lambda answer: answer.kv_bytes / MIB, ".1f"),
    )
    for name, measure, spec in rows:
        less, full = measure(pruned), measure(plain)
        table.add_row(name, f"{less:{spec}}", f"{full:{spec}}", f"{less / full:.0%}" if full else "")
    Console().print(table)


def _check_plot(path: Path | None) -> None:
    """Find out before the model runs whether the picture can be written."""
    if path is None:
        return
    if path.suffix.lower() not in PLOT_FORMATS:
        raise FlexASLError(f"--plot {path} has no known format; give a name that ends in {', '.join(PLOT_FORMATS)}")
    if not path.parent.is_dir():
        raise FlexASLError(f"--plot {path} lies in a folder that does not exist; make {path.parent} first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise FlexASLError("--plot needs matplotlib; install it with: pip install 'flexasl[plot]'") from error


def _write_plot(report: "Report", path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".flexasl-") as folder:
        drawn = Path(folder) / path.name
        report.plot(drawn)
        os.replace(drawn, path)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
