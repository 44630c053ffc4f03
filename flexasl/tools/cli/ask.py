"""`flexasl ask`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flexasl.errors import FlexASLError
from flexasl.tools.cli.answering import answered, load, print_comparison
from flexasl.tools.cli.options import (
    AMOUNT,
    MOST_TOKENS,
    AsJson,
    ConfigFile,
    Device,
    DtypeName,
    KVBudget,
    KVDtypeName,
    Model,
    PolicyName,
    Tau,
    TextFile,
    chosen,
    path_option,
    text_of,
    words,
)
from flexasl.tools.cli.plotting import Html, Plot, check_html, check_plot, draw, write_page
from flexasl.tools.cli.terminal import progress_bar, streamed

LEAST = 256
"""The least that is kept where no number is given."""
OF_PREFILL = ("file", "select_tokens", "kv_budget", "kv_dtype", "tau", "config", "policy")
"""Options that say how a text is read, and so go with --file and not with --cache; `flexasl prefill` has them too."""
OF_A_PROMPT = {"compare": "--compare", "rank_by_question": "--no-rank-by-question"}
"""Other options of `ask` that go with --file alone, and how they are typed."""


def ask(
    context: typer.Context,
    question: Annotated[
        str, typer.Option("--question", "-q", parser=words, metavar="TEXT", help="What to ask about the text.")
    ],
    file: TextFile = None,
    cache: Annotated[Path | None, path_option("Text read before, by flexasl prefill with this model.")] = None,
    model: Model = None,
    select_tokens: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens for the deeper layers: {AMOUNT}.", show_default=f"a quarter of the prompt, {LEAST} to 2048"
        ),
    ] = None,
    kv_budget: KVBudget = None,
    kv_dtype: KVDtypeName = None,
    tau: Tau = None,
    config: ConfigFile = None,
    policy: PolicyName = "asl",
    dtype: DtypeName = None,
    device: Device = "cpu",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer, in tokens.")] = 128,
    as_json: AsJson = False,
    plot: Plot = None,
    html: Html = None,
    rank_by_question: Annotated[
        bool,
        typer.Option(help="Rank the text by the question's own tokens, and keep these; else by the last tokens."),
    ] = True,
    compare: Annotated[bool, typer.Option("--compare", help="Also run the model without pruning.")] = False,
) -> None:
    """Answer a question about a text. Streams the answer, then prints what was pruned."""
    if cache is not None:
        _refuse_beside_cache(context)
    amounts = {"select_tokens": select_tokens, "kv_budget": kv_budget}
    rule, settings = chosen(policy, tau, kv_dtype, config, **amounts)
    check_plot(plot, (file, cache, config, model))
    check_html(html, (file, cache, config, model))
    if not question.strip():
        raise FlexASLError("--question is empty; give a question")
    if cache is not None:
        _ask_saved(cache, question, model, dtype, device, max_new_tokens, plot=plot, html=html, as_json=as_json)
        return
    text = text_of(file)
    loaded, tokenizer = load(model, dtype, device)
    from flexasl.tools import run

    ids = run.question_ids(tokenizer, text, question)
    run.check_fits(loaded, len(ids), max_new_tokens)
    if select_tokens is None and config is None and "select_tokens" in rule.takes:
        settings = settings.replace(select_tokens=min(settings.select_tokens, max(LEAST, len(ids) // 4)))
        rule.check(settings)
    if compare:
        with progress_bar("warming up"):
            run.warm_up(loaded, tokenizer, ids, config=settings, policy=rule)
    asking, title = question if rank_by_question else None, policy if compare else ""
    pruned = answered(
        loaded, tokenizer, ids, max_new_tokens, rule, settings, question=asking, quiet=as_json, title=title
    )
    plain = None
    try:
        if compare:
            plain = answered(loaded, tokenizer, ids, max_new_tokens, quiet=as_json, title="unpruned")
    finally:  # an interrupt, or an error, of the second run does not take the first one's results away
        if as_json:
            print(json.dumps(pruned.to_dict() | ({"unpruned": plain.to_dict()} if plain else {})))
        else:
            print(pruned.report)
        if plain is not None and not as_json:
            print_comparison(pruned, plain, policy)
    draw(pruned.report, plot)
    write_page(html, pruned, tokenizer, ids)


def _ask_saved(
    path: Path,
    question: str,
    model: str | None,
    dtype: str | None,
    device: str,
    max_new_tokens: int,
    *,
    plot: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """`ask` about a text that was read before."""
    with progress_bar(f"checking {path}"):
        from flexasl.saving import read

        saved = read(path)
    if (plot or html) and not saved.reports:
        raise FlexASLError(f"{path} has no report to draw; leave {'--plot' if plot else '--html'} out")
    loaded, tokenizer = load(model, dtype, device)
    from flexasl.tools import run

    with streamed("reading the question", loaded, quiet=as_json) as (show, advance):
        said = run.answer_saved(
            loaded, tokenizer, path, question, max_new_tokens=max_new_tokens, on_text=show, on_layer=advance
        )
    if as_json:
        print(json.dumps(said.to_dict()))
    elif said.report is not None:
        print(f"{path}, read before:\n{said.report}")
    draw(said.report, plot)
    assert saved.token_ids is not None  # the question belongs behind them
    write_page(html, said, tokenizer, saved.token_ids[0].tolist())


def _refuse_beside_cache(context: typer.Context) -> None:
    """Says so where options were given that --cache leaves without effect."""
    for name in (*OF_PREFILL, *OF_A_PROMPT):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            typed = OF_A_PROMPT.get(name, f"--{name.replace('_', '-')}")
            instead = "leave it out" if name in OF_A_PROMPT else "leave it out, or give it to flexasl prefill"
            raise FlexASLError(f"{typed} has no effect with --cache, whose text has been read; {instead}")
