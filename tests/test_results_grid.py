"""`bench/grid.py`: answers that are stored and gone on with, and the pages that are made of them."""

import importlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from test_fuzz_files import answer

from flexasl.tools.evaluation.records import ANSWERS, check

pytestmark = pytest.mark.cpu("reads pages and files, not tensors")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """Modules of `bench/` by name, whose `models` is another than that of the tests."""
    own = [path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "conftest"]
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in own:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in own:
        sys.modules.pop(name, None)


def record(task, index, setting, score, cost):
    """An answer under a setting."""
    policy, _, budget = setting.rpartition("@")
    about = {"task": task, "policy": policy or "full", "budget": int(budget) if policy else None, "tau": None}
    made = {"setting": setting, "score": score, "counted_prefill": cost}
    return check(ANSWERS, {**answer(index, "full" if setting == "full" else "asl@64"), **about, **made})


def told(model="tiny"):
    about = {"device": "cpu", "processor": "x", "python": "3.11", "torch": "2.13", "transformers": "5", "flexasl": "1"}
    return {"identity": {"model": model}, "about": about, "commit": "abc"}


def cells(grid, ours=0.5, other=1.0, cost=0.3):
    """Ours and FastKV on eight prompts of a task, and one task on which the full cache is lost."""
    records = []
    for index in range(8):
        right = float(index < ours * 8)
        records += [record("vt", index, "full", 1.0, 1.0), record("fwe", index, "full", 0.0, 1.0)]
        records += [record("vt", index, "asl@64", right, 0.4), record("fwe", index, "asl@64", 0.25, 0.4)]
        name = f"fixed_layer:{grid.RANKING}@64"
        records += [record("vt", index, name, float(index < other * 8), cost), record("fwe", index, name, 0.9, cost)]
    cell = grid.CELLS["smollm2-ranking"]
    return {"tiny-ranking": (cell, told(), records)}


def test_a_method_that_is_better_at_no_greater_cost_is_named(bench):
    grid, page = bench("grid"), bench("page")
    text = page.results_page(cells(grid), {})
    assert "the difference excludes 0): FastKV with our ranking (1.00 [1.00, 1.00] at 0.30, ours 0.50" in text
    assert "interval of the difference excludes 0): none" in page.results_page(cells(grid, cost=0.5), {})
    assert "interval of the difference excludes 0): none" in page.results_page(cells(grid, ours=1.0), {})


def test_what_the_full_cache_cannot_do_is_named_and_left_out(bench):
    grid, page = bench("grid"), bench("page")
    text = page.results_page(cells(grid), {})
    assert "## Left out" not in text
    missing = {"run": ["smollm2-8k", "gemma-paper"], "time": []}
    assert "- `python bench/grid.py run smollm2-8k gemma-paper`" in page.results_page(cells(grid), {}, missing)
    assert "`fwe` (0.00)" in text and "| FastKV | – | – | 1.00 [1.00, 1.00] at 0.30 | 0.60 |" in text


def test_cells_are_set_side_by_side_on_the_prompts_that_they_share(bench, tmp_path):
    grid, page = bench("grid"), bench("page")
    made = cells(grid)
    cell, about, records = made["tiny-ranking"]
    fewer = [{**one, "score": one["score"] / 2} for one in records if one["index"] < 4]
    made |= {f"tiny-{kind}": (cell, about, fewer) for kind in ("behind60", "front", "4k", "squad")}
    text = page.results_page(made, {})
    assert "all ranked by the question; 4 prompts of 1 task within the model's reach:\n\n" in text
    assert "| method | nothing after it | 60 tokens | the question in front |" in text
    beside = text.partition("all ranked by the question;")[2].split("\n\n")[1].splitlines()
    (line,) = [line for line in beside if line.startswith("| **FlexASL**, default settings | ")]
    before, *halves = (float(cell.split()[0]) for cell in line.split(" | ")[1:])
    assert len(halves) == 2 and all(one == pytest.approx(before / 2, abs=0.01) for one in halves)
    assert "length of the prompt, all ranked by the question; 4 prompts" in text and "| 2,048 tokens | 4,096 |" in text
    assert "questions in SQuAD's format, over made-up articles |" in text
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"a {page.BEGIN} old {page.END} b")
    page.write_pages(made, tmp_path, {})
    for name in ("grid", "layers", "behind"):
        assert f"({name}.png)" in text and (tmp_path / "docs" / "results" / f"{name}.png").stat().st_size > 5_000
    assert (tmp_path / "README.md").read_text().startswith(f"a {page.BEGIN}\n|")


def test_time_and_memory_stand_beside_the_counted_cost(bench):
    grid, page, first_token = bench("grid"), bench("page"), bench("first_token")
    made = cells(grid)
    name = f"fixed_layer:{grid.RANKING}@64"
    timed = {"full": {"share": 1.0, "counted": 1.0}, name: {"share": 0.41, "counted": 0.3}}
    peaked = {"full": {"peak": 400, "kv": 80}, name: {"peak": 100, "kv": 20}}
    where = {"command": "c", "hardware": "h", "versions": "v", "commit": "abc", "tokens": 1999}
    times = {"tiny-ranking": where | {"settings": first_token.shares(timed, peaked, "full")}}
    text = page.results_page(made, times)
    assert (
        "first prompt of 1,999 tokens" in text and "| FastKV | with our ranking | 0.30 | 0.41 | 0.25 | 0.25 |" in text
    )
    assert "first prompt" not in page.results_page(made, {"other-ranking": times["tiny-ranking"]})


def test_order_of_answers_makes_no_difference(bench):
    grid, page = bench("grid"), bench("page")
    (name, (cell, about, records)), *_ = cells(grid).items()
    mixed = random.Random(0).sample(records, len(records))
    one, other = ({name: (cell, about, some)} for some in (records, mixed))
    assert page.results_page(one, {}) == page.results_page(other, {})
    assert page.readme_part(one) == page.readme_part(other)


def test_stored_answers_are_gone_on_with(bench, monkeypatch, tmp_path):
    grid = bench("grid")
    monkeypatch.setattr(grid, "STORE", tmp_path / "store")
    (name, (_, about, records)), *_ = cells(grid).items()
    folder = tmp_path / "first"
    folder.mkdir()
    run = {key: value for key, value in about.items() if key != "commit"}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "answers-0.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records[:20]) + '{"half')
    with pytest.raises(KeyboardInterrupt), grid._packed(name, folder):
        raise KeyboardInterrupt
    grid._restore(name, tmp_path / "second")
    with (tmp_path / "second" / "answers-0.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in records[20:])
    grid.pack(name, tmp_path / "second")
    interrupted = grid.stored(name).read_bytes()
    grid.stored(name).unlink()
    (folder / "answers-0.jsonl").write_text("".join(json.dumps(one) + "\n" for one in reversed(records)))
    grid.pack(name, folder)
    assert grid.stored(name).read_bytes() == interrupted and len(grid.read(name)[1]) == len(records)
    assert grid.read(name)[0]["identity"] == about["identity"]


def test_every_cell_is_a_plan_that_flexasl_eval_takes(bench, tmp_path):
    grid, questions = bench("grid"), bench("squad").write_questions(tmp_path)
    from flexasl import evaluation
    from flexasl.tools.evaluation.sources import Sources

    for cell in grid.CELLS.values():
        sources = Sources(qa_files=(questions,)) if cell.tasks == grid.SQUAD_TASKS else None
        how = {
            "sources": sources,
            "tasks": cell.tasks,
            "lengths": [cell.length],
            "samples": cell.samples,
            "policies": cell.policies,
        }
        plan = evaluation.plan(**how, budgets=[cell.budget], seed=grid.SEED, **cell.options)
        assert len(plan.settings) == 1 + len(cell.policies)
        assert cell.command().startswith(
            "flexasl eval --together --tasks " if cell.together else "flexasl eval --tasks "
        )


def test_questions_that_we_write_are_of_squads_format(bench, tmp_path):
    from flexasl.tools.evaluation.sources import SQUAD, Sources

    questions = Sources(qa_files=(bench("squad").write_questions(tmp_path),)).questions(SQUAD)
    assert len(questions.questions) == 320
    assert all(any(text in where for text in one.answers for where in one.needed) for one in questions.questions)


def test_pages_are_those_of_the_stored_answers(tmp_path):
    """README's table and docs/results/README.md are what the command makes of docs/results/grid."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", tmp_path)
    command = [sys.executable, str(ROOT / "bench" / "grid.py"), "page", "--root", str(tmp_path)]
    subprocess.run(command, check=True)
    for name in ("README.md", "docs/results/README.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"run: python bench/grid.py page ({name})"
    assert (tmp_path / "docs" / "results" / "grid.png").stat().st_size > 10_000
