"""What a figure was measured on, so that it can be measured again."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


@functools.cache
def setting() -> dict[str, str]:
    """Command, hardware, versions and commit of this run, as they were when first asked for. The environment variable
    FLEXASL_COMMIT names the commit where the code is no checkout."""
    torch_and_python = f"torch {torch.__version__}, Python {platform.python_version()}"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "command": _command(),
        "hardware": cuda or f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": f"{torch_and_python}, transformers {transformers.__version__}",
        "commit": os.environ.get("FLEXASL_COMMIT") or _commit(),
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark of pruned prompts has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 4000], help="prompt lengths")
    parser.add_argument("--select-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="where to write the table, without ending")
    return parser


def table(heads: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(out: Path | None, title: str, body: str, data: dict[str, Any], *, quiet: bool = False) -> None:
    """Prints the result, unless quiet, and writes it to `out`.md and `out`.json where a path is given."""
    where = setting()
    text = f"# {title}\n\n" + "\n".join(f"- {name}: {value}" for name, value in where.items()) + f"\n\n{body}\n"
    if not quiet:
        print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(text)
        out.with_suffix(".json").write_text(json.dumps({"setting": where, **data}, indent=1) + "\n")


def _command() -> str:
    """As one types it: pytest by name, paths from here."""
    program, *rest = sys.argv
    program = "pytest" if "pytest" in program else f"python {os.path.relpath(program)}"
    return " ".join([program, *(os.path.relpath(one) if os.path.isabs(one) else one for one in rest)])


def _commit() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "flexasl"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
