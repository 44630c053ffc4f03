"""Models, their answers, and one answer beside another."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flexasl.config import ASLConfig
from flexasl.policies import Policy
from flexasl.tools.cli.terminal import progress_bar, streamed

# torch and transformers take seconds to import, so commands import `flexasl.run` after `load`: help must be quick.
if TYPE_CHECKING:
    from flexasl.tools.run import Answer

MIB = 2**20


def load(model: str | None, dtype: str | None, device: str) -> tuple[Any, Any]:
    """Model and tokenizer, and before them `flexasl.run`, whose imports take seconds, behind one bar."""
    with progress_bar("loading the model"):
        for name in ("torchao", "torch.utils._pytree"):  # of kernels that a machine without a GPU has no use for
            logging.getLogger(name).setLevel(logging.ERROR)
        from transformers.utils.logging import set_verbosity_error

        from flexasl.tools import run

        set_verbosity_error()
        return run.load_model(model, dtype, device)


def answered(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    policy: Policy | None = None,
    config: ASLConfig | None = None,
    *,
    question: str | None = None,
    title: str = "",
    begin: str = "",
    quiet: bool = False,
) -> "Answer":
    """Run once, with a bar over the layers of the prefill, then the answer as it comes."""
    from flexasl.tools import run

    words = f"reading {len(ids):,} tokens"
    with streamed(words, model, begin=f"{title}: {begin}" if title else begin, quiet=quiet) as (show, advance):
        return run.answer(
            model,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            config=config,
            policy=policy,
            question=question,
            on_text=show,
            on_layer=advance,
        )


def print_comparison(pruned: "Answer", plain: "Answer", policy: str) -> None:
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
