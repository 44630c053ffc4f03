"""The report of an evaluation: tables, pictures, and one page that holds them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexasl.checks import path
from flexasl.errors import FlexASLError
from flexasl.stored import dump
from flexasl.tools.evaluation.runner import ANSWERS, PROMPTS, answer_key, prompt_key
from flexasl.tools.evaluation.storage import PICTURES, REPORT, RESULTS, SCORES, TIMES, read_all, read_keys, read_run
from flexasl.writing import replaced, write

RANKED = {
    "policy": "the question under adaptive selection, the window under other policies",
    "question": "the question",
    "window": "the window",
}
"""What ranks tokens, by a plan's `rank_by`."""


def report(out: str | Path) -> Path:
    """Makes the report of a folder that `evaluate` has written to, finished or not, and returns its path.

    It writes `results.jsonl` (all answers, sorted), `scores.md`, `times.md` where seconds were measured, the pictures
    and `report.md`. `scores.md` does not depend on how long anything took.

    Args:
        out: The folder.

    Raises:
        FlexASLError: The folder holds no answers.
    """
    out = path("out", out)
    run = read_run(out)
    records = read_all(out, ANSWERS, answer_key)
    if not records:
        raise FlexASLError(f"out={out} holds no answers yet; nothing to report")
    from flexasl.tools.evaluation import plots
    from flexasl.tools.evaluation.tables import Results, score_tables, time_tables

    results = Results(records)
    scores, times = score_tables(results), time_tables(results) if results.timed else None
    write(out / RESULTS, "".join(dump(record) + "\n" for record in results.records))
    write(out / SCORES, scores)
    if times is not None:
        write(out / TIMES, times)
    drawn: list[tuple[str, str, str]] = []
    for name, (title, caption, draw) in zip(
        PICTURES,
        (
            ("Score against prefill cost", "Up and to the left is better.", plots.pareto),
            ("Needle by length and depth", "Depth 0 % is the start of the text.", plots.heat_map),
            ("Chosen layers", "Pale: loose selections, before the final one.", plots.chosen_layers),
            (
                "What decides, by layer",
                "A look-up selects at its threshold and above, the rank variance below tau.",
                plots.decisions,
            ),
        ),
        strict=True,
    ):
        figure = draw(results)
        if figure is None:
            (out / name).unlink(missing_ok=True)
            continue
        with replaced(out / name) as new:
            figure.savefig(new, dpi=120)
        drawn.append((name, title, caption))
    prompts = len(read_keys(out, PROMPTS, prompt_key))
    write(out / REPORT, _page(run, results, prompts, scores, times, drawn))
    return out / REPORT


def _page(
    run: dict[str, Any], results: Any, prompts: int, scores: str, times: str | None, drawn: list[tuple[str, str, str]]
) -> str:
    identity, about = run["identity"], run["about"]
    missing = prompts * len(results.settings) - len(results.records)
    measured = ", or measured in seconds until the first token" if times is not None else ""
    parts = [
        f"# Evaluation of {identity['model']}",
        f"Prompts: {prompts:,}; tasks: {len(results.tasks)}; settings: {len(results.settings)}. `full` is the "
        "unpatched model with its full cache. Scores are means with 95 % bootstrap intervals (fixed seed); answers are "
        f"greedy. Prefill costs are shares of the full one's, counted in operations{measured}.",
    ]
    if missing:
        parts.append(f"**Not finished:** {missing:,} answers are missing, so rows may not be compared yet.")
    for name, title, caption in drawn:
        parts += [f"## {title}", f"![{title}]({name})", *([caption] if caption else [])]
    files = ", ".join(f"{name} ({digest[:12]})" for name, digest in identity["files"].items()) or "none"
    made = {
        "model": f"{identity['model']}, {identity['parameters']:,} parameters, {identity['dtype']}",
        "chat template": "none" if identity["chat_template"] is None else "the tokenizer's, in run.json",
        "seed": identity["seed"],
        "longest answer, tokens": identity.get("answer_tokens") or "as the benchmarks have it",
        "ranked by": RANKED[identity.get("rank_by", "window")],
        "question": "before the text" if identity.get("question_first") else "after the text",
        "after the question": identity.get("after_question") or "nothing",
        "start of the answer": "in the prompt" if identity.get("answer_prefix", True) else "left out",
        "the model's profile": "used, where there is one" if identity.get("profile", True) else "not used",
        "answers": "all of a prompt at once, without a clock" if identity.get("together") else "one by one",
        "files given": files,
        "run on": f"{about['device']}, {about['processor']}, Python {about['python']}, torch {about['torch']}, "
        f"transformers {about['transformers']}, flexasl {about['flexasl']}",
    }
    rows = "\n".join(f"- {name}: {value}" for name, value in made.items())
    parts += ["# Scores", scores.rstrip()]
    if times is not None:
        parts += ["# Measured time", times.rstrip(), "Medians, with quartiles."]
    return "\n\n".join([*parts, "# Made with", rows]) + "\n"
