"""Every method on every model: answers into `docs/results/grid`, and the pages that are made of them.

    python bench/grid.py run [CELL ...] [--models FOLDER]     answers what is missing, hours of it, and can be stopped
    python bench/grid.py time [CELL ...] [--models FOLDER]    time to the first token and memory of a cell's settings
    python bench/grid.py page                                 tables and pictures, from the answers that are there

A cell is an evaluation of one model. `run` and `time` without a name go through all, and name those whose model is not
there.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import first_token
from memory import LEAN
from methods import VARIANTS
from models import MODELS
from page import write_pages
from setting import setting
from squad import write_questions

from flexasl import evaluation
from flexasl.tools.evaluation.plans import Setting
from flexasl.tools.evaluation.records import ANSWERS, check
from flexasl.tools.evaluation.runner import answer_key, evaluate
from flexasl.tools.evaluation.sources import Sources
from flexasl.tools.evaluation.storage import RUN, read_all
from flexasl.tools.evaluation.tasks import build
from flexasl.tools.loading import load_model
from flexasl.tools.text import encode

ROOT = Path(__file__).parent.parent
STORE = ROOT / "docs" / "results" / "grid"
SEED = 180
"""No setting was chosen on its prompts."""
BUDGET = 256
QUESTIONS = "questions.json"
"""What `bench/squad.py` writes."""
LITERAL = ("niah_single_2", "niah_multikey_1", "number_string")
TASKS = (*LITERAL, "niah_single_3", "niah_multivalue", "vt", "fwe", "kv_retrieval", "by_meaning", "uniform")
FEW_TASKS = (*LITERAL, "by_meaning", "uniform")
SQUAD_TASKS = ("qa_1",)
"""Of questions that `bench/squad.py` writes."""
POOLING = "kernel_size=17,pooling=phrase"
RANKING = f"{POOLING},score_power=max,contrast=true"
POOLED = ("fixed_layer", "snapkv", "pyramid_kv", "pyramid_infer")


@dataclass(frozen=True)
class Cell:
    """One evaluation."""

    model: str
    """`SmolLM2-135M-Instruct`, which is embedded, or a key of `bench/models.py`."""
    policies: tuple[str, ...]
    samples: int
    tasks: tuple[str, ...] = TASKS
    length: int = 2048
    budget: int = BUDGET
    options: dict[str, Any] = field(default_factory=dict)
    """Of `flexasl.evaluation.plan`."""
    together: bool = True
    """Whether settings share the layers in which they agree, which holds their states in memory."""

    def command(self) -> str:
        """What `flexasl eval` answers the same with."""
        told = ["flexasl", "eval", *(["--together"] if self.together else [])]
        told += ["--tasks", ",".join(self.tasks), "--lengths", str(self.length)]
        told += ["--samples", str(self.samples), "--budget", str(self.budget), "--answer-tokens", "48"]
        told += ["--seed", str(SEED)]
        told += ["--policies", ",".join(self.policies)]
        told += ["--qa-file", QUESTIONS] if self.tasks == SQUAD_TASKS else []
        told += [] if self.model == EMBEDDED else ["--model", MODELS[self.model].file]
        for name, value in self.options.items():
            option = name.replace("_", "-")
            told += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", value]
        return shlex.join(told)


EMBEDDED = "SmolLM2-135M-Instruct"
BY_QUESTION: dict[str, Any] = {"rank_by": "question", "profile": False}
KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "ranking": BY_QUESTION,
    "pooling": {"rank_by": "window"},
    "rules": {"after_question": "rules", "answer_prefix": False},
    "behind30": BY_QUESTION | {"after_question": "rules-30"},
    "behind60": BY_QUESTION | {"after_question": "rules"},
    "behind120": BY_QUESTION | {"after_question": "rules-120"},
    "front": BY_QUESTION | {"question_first": True},
    "squad": BY_QUESTION,
}
"""Of cells at 2,048 tokens: what they ask of `flexasl.evaluation.plan`."""
OURS = ("asl", f"asl:kv_budget={BUDGET}")
FEW_METHODS = ("asl", f"fixed_layer:{RANKING}", f"snapkv:{RANKING}")


def _cells(short: str, model: str, samples: int, layers: tuple[int, int], loose: int) -> dict[str, Cell]:
    """All methods on a model. layers: fixed ones to compare with; loose: that of a first stage before the first of
    them."""
    first = layers[0]
    fixed = [f"fixed_layer:layer={layer},{RANKING}" for layer in layers]
    two = f"asl:stages=0.4@{loose}-{loose},min_layer={first},max_layer={first}"
    policies = {
        "paper": (*OURS, "paper", "fixed_layer", "gemfilter", "snapkv", "pyramid_kv", "pyramid_infer", "streaming"),
        "ranking": (*OURS, f"fixed_layer:{RANKING}", *fixed, two, *(f"{name}:{RANKING}" for name in POOLED[1:])),
        "pooling": (f"paper:{POOLING}", *(f"{name}:{POOLING}" for name in POOLED)),
        "rules": ("asl", "fixed_layer", "snapkv"),
    }
    tasks = dict.fromkeys(VARIANTS, TASKS) | {"squad": SQUAD_TASKS}
    return {
        f"{short}-{kind}": Cell(
            model,
            policies.get(kind, FEW_METHODS),
            8 if kind == "squad" else samples,
            tasks.get(kind, FEW_TASKS),
            options=options,
        )
        for kind, options in KINDS.items()
    }


def _few(short: str, model: str, samples: int) -> dict[str, Cell]:
    """The methods that matter most, on another model."""
    return {
        f"{short}-paper": Cell(model, OURS, samples),
        f"{short}-ranking": Cell(model, (*OURS, *FEW_METHODS[1:]), samples, options=BY_QUESTION),
    }


def _longer(short: str, model: str, lengths: dict[str, tuple[int, int]]) -> dict[str, Cell]:
    """The same on longer prompts. lengths: by name, tokens and budget."""
    return {
        f"{short}-{name}": Cell(model, FEW_METHODS, 1, FEW_TASKS, length, budget, BY_QUESTION)
        for name, (length, budget) in lengths.items()
    }


CELLS = {
    **_cells("smollm2", EMBEDDED, 3, (10, 17), 7),
    **_longer("smollm2", EMBEDDED, {"4k": (4096, BUDGET), "8k": (8000, BUDGET)}),
    **_cells("qwen-0.5b", "qwen2.5-coder-0.5b", 2, (8, 14), 3),
    **_longer("qwen-0.5b", "qwen2.5-coder-0.5b", {"4k": (4096, BUDGET), "8k": (8192, BUDGET)}),
    # One method alone: 14 GiB would hold the states of three, and their prefills take an hour.
    "qwen-0.5b-16k": Cell(
        "qwen2.5-coder-0.5b", ("asl",), 1, (*FEW_TASKS, "niah_multivalue"), 16384, 1024, BY_QUESTION, together=False
    ),
    **_few("qwen-1.5b", "qwen2.5-coder-1.5b", 1),
    **_few("gemma", "gemma3-270m", 2),
}

TIMED = [name for name in CELLS if name.rpartition("-")[2] in ("paper", "ranking")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    running, timing = steps.add_parser("run"), steps.add_parser("time")
    for step, names in ((running, [*CELLS]), (timing, TIMED)):
        step.add_argument("cells", nargs="*", choices=[[], *names], default=[], metavar="CELL")
        step.add_argument("--models", type=Path, default=Path("models"), help="folder of `bench/models.py`")
        step.add_argument("--out", type=Path, default=Path("out/grid"))
    timing.add_argument("--pairs", type=int, default=3, help="paired runs of each setting")
    timing.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    paging = steps.add_parser("page")
    paging.add_argument("--root", type=Path, default=ROOT, help="folder with README.md and docs/results")
    args = parser.parse_args()
    if args.step == "page":
        cells = {name: (cell, *read(name)) for name, cell in CELLS.items() if stored(name).exists()}
        times = {name: json.loads(timed(name).read_text()) for name in cells if timed(name).exists()}
        missing = {
            "run": [name for name in CELLS if name not in cells],
            "time": [name for name in TIMED if name not in times],
        }
        write_pages(cells, args.root, times, missing)
        return
    if args.step == "time" and args.peaks:
        print(json.dumps(first_token.peaks(*_first_prompt(args.cells[0], args.models, args.out))))
        return
    missing = []
    for name in args.cells or (CELLS if args.step == "run" else TIMED):
        try:
            if args.step == "run":
                run(name, args.models, args.out)
            else:
                time(name, args.models, args.out, args.pairs)
        except FileNotFoundError as error:
            missing.append(f"{name} is left out: {error}")
    if missing:
        sys.exit("\n".join(missing))


def run(name: str, models: Path, out: Path) -> None:
    """Answers what the store lacks of a cell. Raises FileNotFoundError where the model's file is not there."""
    cell, folder = CELLS[name], out / name
    model, tokenizer = _model(cell, models)
    _restore(name, folder)
    with _packed(name, folder):
        evaluate(
            _plan(cell, out),
            model,
            tokenizer,
            folder,
            together=cell.together,
            on_progress=lambda *told: print(name, *told, flush=True),
        )


def time(name: str, models: Path, out: Path, pairs: int) -> None:
    """Measures a cell's settings on its first prompt, on a machine that does nothing else, and stores the shares."""
    where = setting()
    model, tokenizer, ids, settings = _first_prompt(name, models, out)
    seconds = first_token.times(model, tokenizer, ids, settings, pairs)
    del model
    again = [sys.executable, __file__, "time", name, "--models", str(models), "--out", str(out), "--peaks"]
    lean = subprocess.run(again, env=os.environ | LEAN, capture_output=True, text=True, check=True)
    peaks = json.loads(lean.stdout.splitlines()[-1])
    told = where | {"tokens": len(ids), "settings": first_token.shares(seconds, peaks, settings[0].label)}
    timed(name).write_text(json.dumps(told, indent=1) + "\n")


def stored(name: str) -> Path:
    """The file of a cell's answers."""
    return STORE / f"{name}.jsonl.gz"


def timed(name: str) -> Path:
    """The file of a cell's times and memory."""
    return STORE / f"{name}.time.json"


def _model(cell: Cell, models: Path) -> tuple[Any, Any]:
    file = None if cell.model == EMBEDDED else models / MODELS[cell.model].file
    if file is not None and not file.exists():
        raise FileNotFoundError(f"{file} does not exist; fetch it with: python bench/models.py {cell.model}")
    return load_model(None if file is None else str(file))


def _plan(cell: Cell, out: Path) -> evaluation.Plan:
    return evaluation.plan(
        tasks=cell.tasks,
        lengths=[cell.length],
        samples=cell.samples,
        policies=cell.policies,
        budgets=[cell.budget],
        seed=SEED,
        answer_tokens=48,
        sources=Sources(qa_files=(write_questions(out),)) if cell.tasks == SQUAD_TASKS else None,
        **cell.options,
    )


def _first_prompt(name: str, models: Path, out: Path) -> tuple[Any, Any, list[int], tuple[Setting, ...]]:
    """A cell's model and tokenizer, the token ids of its first prompt, and its settings, the full cache first."""
    cell = CELLS[name]
    model, tokenizer = _model(cell, models)
    plan = _plan(cell, out)
    first = plan.items()[0]
    sample = build(first.task, tokenizer, first.length, plan.seed, first.index, plan.sources, plan.wording)
    return model, tokenizer, encode(tokenizer, sample.prompt), plan.settings


def read(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a stored cell was run with, and the answers of its settings."""
    lines = gzip.decompress(stored(name).read_bytes()).splitlines()
    wanted = {"full", *CELLS[name].policies} if name in CELLS else None
    told: dict[str, Any] = json.loads(stored(name).with_name(f"{name}.json").read_text())
    records = [check(ANSWERS, json.loads(line)) for line in lines]
    return told, [record for record in records if wanted is None or record["policy"] in wanted]


def _restore(name: str, folder: Path) -> None:
    """Puts stored answers where an evaluation continues from them."""
    if (folder / RUN).exists() or not stored(name).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    told = {key: value for key, value in read(name)[0].items() if key != "commit"}
    (folder / RUN).write_text(json.dumps(told, indent=1) + "\n")
    (folder / f"{ANSWERS}-0.jsonl").write_bytes(gzip.decompress(stored(name).read_bytes()))


@contextlib.contextmanager
def _packed(name: str, folder: Path) -> Iterator[None]:
    """Stores the answers that are there in the end, whatever ends it."""
    try:
        yield
    finally:
        pack(name, folder)


def pack(name: str, folder: Path) -> None:
    """Stores an evaluation's answers, the same bytes for the same answers, and the commits that made them."""
    records = read_all(folder, ANSWERS, answer_key) if (folder / RUN).exists() else []
    if not records:
        return
    lines = sorted(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    packed, known = gzip.compress("".join(lines).encode(), mtime=0), stored(name).with_name(f"{name}.json")
    if stored(name).exists() and stored(name).read_bytes() == packed:
        return
    commits = json.loads(known.read_text())["commit"].split(", ") if known.exists() else []
    STORE.mkdir(parents=True, exist_ok=True)
    stored(name).write_bytes(packed)
    told = json.loads((folder / RUN).read_text()) | {"commit": ", ".join(dict.fromkeys([*commits, _commit()]))}
    known.write_text(json.dumps(told, indent=1) + "\n")


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
