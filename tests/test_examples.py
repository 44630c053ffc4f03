"""Every script of `examples/`, and the notebook, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu("starts commands, which choose a device themselves")

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOK = FOLDER / "flexasl.ipynb"
SAYS = {
    "ask_document.py": ["Marguerite Dunmore", "256 kept from layer", "See why.html"],
    "batch.py": ["60494 is right", "256 kept, layer"],
    "lm_eval_task.py": ["select_tokens=1.0: 1.00 right; cache 100% of full", "select_tokens=128: "],
    "own_policy.py": [
        "policy halving, 30 layers",
        "256 kept from layer 16 of 30 on (selected at layers 7 (591 tokens), 15)",
    ],
    "plain_decoder.py": ["64 kept from layer"],
    "saved_prompt.py": ["Marguerite Dunmore", "five in the morning", "(19 new tokens read)"],
}
"""What each script prints, among other things."""
NEEDS = {"lm_eval_task.py": "lm_eval"}


def done(*arguments, cwd=None):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    "name", [one if one == "plain_decoder.py" else pytest.param(one, marks=pytest.mark.slow) for one in SAYS]
)
def test_the_example_runs(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    ended = done(FOLDER / name, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for words in SAYS[name]:
        assert words in ended.stdout, ended.stdout
    written = ["why.html"] if name == "ask_document.py" else []
    assert [file.name for file in tmp_path.iterdir()] == written


@pytest.mark.slow
def test_right_answers_of_the_batch_and_of_the_policy(tmp_path):
    for name, count in (("batch.py", 3), ("own_policy.py", 2)):
        told = [line for line in done(FOLDER / name, cwd=tmp_path).stdout.splitlines() if line.endswith("is right)")]
        assert len(told) == count and all(line.count(line.split("(")[-1].split()[0]) == 2 for line in told), told


@pytest.mark.slow
def test_a_document_of_ones_own(tmp_path):
    (tmp_path / "facts.txt").write_text("The red door opens at noon. The green door opens at midnight. " * 2)
    ended = done(FOLDER / "ask_document.py", "facts.txt", "When does the green door open?", cwd=tmp_path)
    assert "midnight" in ended.stdout and "nothing pruned" in ended.stdout, ended.stdout + ended.stderr


def test_every_example_is_run():
    assert {file.name for file in FOLDER.glob("*.py")} == set(SAYS)
    assert [file.name for file in FOLDER.iterdir() if file.suffix not in (".py", "")] == [NOTEBOOK.name]


def test_lm_eval_is_asked_for_where_it_is_missing():
    code = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    ended = done("-c", code, FOLDER / "lm_eval_task.py")
    assert ended.returncode == 1
    assert ended.stderr == "this example needs lm-eval; install it with: pip install lm-eval\n"


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), NOTEBOOK.name, "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    data = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    texts = " ".join(one.get("text/plain", "") for one in data)
    assert texts.count("27611") >= 2, "the fact, and the answer"
    shown = [one["text/html"] for one in data if "text/html" in one]
    assert '<div class="flexasl">' in shown[0] and "256 kept from layer" in shown[0]
    assert "27611" in (tmp_path / "why.html").read_text(encoding="utf-8")
