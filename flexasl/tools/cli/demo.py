"""`flexasl demo`."""

import sys
from typing import Annotated

import typer

from flexasl.policies.grammar import parse
from flexasl.tools.cli.answering import answered, load, print_comparison
from flexasl.tools.cli.options import (
    AMOUNT,
    MOST_TOKENS,
    Depth,
    Device,
    DtypeName,
    Model,
    PolicyName,
    Seed,
    chosen,
)
from flexasl.tools.cli.terminal import progress_bar
from flexasl.tools.text import magic_number, needle_prompt, prompt_ids

DEMO_ANSWER_TOKENS = 12


def demo(
    tokens: Annotated[int, typer.Option(min=256, max=MOST_TOKENS, help="Length of the prompt, in tokens.")] = 4000,
    depth: Depth = 0.4,
    seed: Seed = 0,
    select_tokens: Annotated[
        str | None, typer.Option(help=f"Tokens for the deeper layers: {AMOUNT}.", show_default="512")
    ] = None,
    policy: PolicyName = "asl",
    model: Model = None,
    dtype: DtypeName = None,
    device: Device = "cpu",
) -> None:
    """Hide a fact in a long text, ask for it with and without pruning, and compare.

    Exit status 1 if the pruned answer does not contain the fact.
    """
    named = parse(policy)
    if select_tokens is None and "select_tokens" in named.policy.takes - named.settings.keys():
        select_tokens = "512"
    rule, config = chosen(policy, select_tokens=select_tokens)
    loaded, tokenizer = load(model, dtype, device)
    from flexasl.tools import run

    fact = magic_number(seed)
    run.check_fits(loaded, tokens, DEMO_ANSWER_TOKENS)
    message = needle_prompt(
        tokenizer, tokens, depth, fact.needle, fact.question, seed, answer_prefix=fact.answer_prefix
    )
    ids = prompt_ids(tokenizer, message, fact.answer_prefix)
    print(f"Hidden at {depth:.0%} of {len(ids):,} tokens: {fact.needle}\nQuestion: {fact.question}\n")
    with progress_bar("warming up"):
        run.warm_up(loaded, tokenizer, ids, config=config, policy=rule)
    begin = fact.answer_prefix
    most, asked = DEMO_ANSWER_TOKENS, fact.question
    pruned = answered(loaded, tokenizer, ids, most, rule, config, question=asked, title=policy, begin=begin)
    plain = answered(loaded, tokenizer, ids, most, title="unpruned", begin=begin)
    print(pruned.report)
    print_comparison(pruned, plain, policy)
    if fact.answer not in pruned.text:
        print(f"flexasl: the pruned answer does not contain {fact.answer}", file=sys.stderr)
        raise typer.Exit(1)
