"""The code on the pages that a reader is told to paste, run as it stands."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu("starts commands, which choose a device themselves")

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.mark.slow
def test_the_tour_and_its_batches_do_what_they_show(capsys):
    names = {}
    for block in (*blocks("tour.md", "python"), *blocks("batches.md", "python")):
        exec(block, names)
        said = capsys.readouterr().out
        for shown in re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE):
            assert said == f"{shown}\n"
        if "tokenizer.decode(out[0" in block:
            assert said == blocks("tour.md", "")[1]
        if block == "print(patch.report)\n":
            told = blocks("tour.md", "")[2]
            assert said.splitlines()[:-1] == told.splitlines()[:-1]  # all but the seconds
    assert len(names["patch"].report.rows) == 1 and "red tin" in names["messages"][1]["content"]
    assert not hasattr(names["model"], "flexasl_patch")
