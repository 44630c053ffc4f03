"""`flexasl prefill`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flexasl.errors import FlexASLError
from flexasl.stored import nameable
from flexasl.tools.cli.answering import MIB, load
from flexasl.tools.cli.options import (
    AsJson,
    ConfigFile,
    Device,
    DtypeName,
    KVBudget,
    KVDtypeName,
    Model,
    PolicyName,
    SelectTokens,
    Tau,
    TextFile,
    chosen,
    path_option,
    text_of,
    words,
)
from flexasl.tools.cli.plotting import Plot, check_plot, draw
from flexasl.tools.cli.terminal import progress_bar


def prefill(
    out: Annotated[Path, path_option("File to write, such as contract.safetensors.")],
    file: TextFile = None,
    about: Annotated[
        str | None,
        typer.Option(
            "--question",
            "-q",
            "--about",
            parser=words,
            metavar="TEXT",
            help="What will be asked, in any words: ranks the text, and is read after it.",
        ),
    ] = None,
    model: Model = None,
    select_tokens: SelectTokens = None,
    kv_budget: KVBudget = None,
    kv_dtype: KVDtypeName = None,
    tau: Tau = None,
    config: ConfigFile = None,
    policy: PolicyName = "asl",
    dtype: DtypeName = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Read a text once and save its KV cache, for flexasl ask --cache."""
    amounts = {"select_tokens": select_tokens, "kv_budget": kv_budget}
    rule, settings = chosen(policy, tau, kv_dtype, config, **amounts)
    from flexasl import saving

    saving.check_target(out, "--out", (file, config, model))
    check_plot(plot, (file, config, model, out))
    if plot is not None and plot == out:
        raise FlexASLError(f"--plot {plot} is what --out writes; give another name")
    about = None if about is None else about.strip()
    if about == "":
        raise FlexASLError("--question is empty; give what will be asked, or leave it out")
    text = text_of(file)
    loaded, tokenizer = load(model, dtype, device)
    from flexasl.tools import run

    run.check_savable(loaded)
    ids, notes = run.opening_ids(tokenizer, text, about or "")
    run.check_fits(loaded, len(ids), 1)
    with progress_bar(f"reading {len(ids):,} tokens", loaded.config.get_text_config().num_hidden_layers) as bar:
        made = run.prefill(
            loaded,
            ids,
            config=settings,
            policy=rule,
            tokenizer=tokenizer,
            question=about,
            on_layer=bar.advance,
        )
    report = made.reports[-1]
    if not as_json:
        print(report)
    with progress_bar(f"writing {out}"):
        made.save(out, notes=notes | {"source": nameable(file or "-"), "about": about or ""})
    size = out.stat().st_size
    if as_json:
        print(json.dumps({"path": str(out), "bytes": size, "report": report.to_dict()}))
    else:
        print(f"saved: {out}, {size / MIB:,.1f} MiB")
    draw(report, plot)
