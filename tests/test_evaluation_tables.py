"""Tables and pictures of an evaluation tell of decisions: layers of every selection, why, and which text ranked."""

from typing import Any

import pytest

pytest.importorskip("matplotlib")

from test_fuzz_files import answer

from flexasl.picture import THRESHOLD
from flexasl.stored import Unfit
from flexasl.tools.evaluation import plots
from flexasl.tools.evaluation.records import ANSWERS, check
from flexasl.tools.evaluation.tables import Results, score_tables

STAGES = [[0.3, 1, 2], [0.5, 2, 4]]
NEW = ("selections", "ranked_by", "thresholds", "lookup")


def looked_up(index: int, at: dict[int, int], seen: dict[int, float], ranked_by: str = "Which?") -> dict[str, Any]:
    """A prompt with selections (layer and tokens), and the highest score of a far token by layer."""
    made = [{"layer": layer, "kept_tokens": kept} for layer, kept in at.items()]
    told: dict[str, Any] = {"selections": made, "selected_layer": max(at, default=None), "thresholds": STAGES}
    told |= {"eval_layers": list(seen), "lookup": list(seen.values()), "variance_ratio": [], "ranked_by": ranked_by}
    return check(ANSWERS, {**answer(index, "asl@64"), **told, "tau": 0.5})


RECORDS = [
    looked_up(0, {1: 80, 2: 64}, {1: 0.9, 2: 0.72}),
    looked_up(1, {2: 80, 4: 64}, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.361}),  # .361 is under .5 * .85 ** 2 = .36125
    looked_up(2, {2: 80, 4: 64}, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.362}, "the last 32 tokens; no question was found"),
    looked_up(3, {1: 64}, {1: 0.31}, "the last 32 words of the text: who wrote them?"),
    looked_up(4, {}, {}, ""),
]


def cells(records: list[dict[str, Any]]) -> list[str]:
    """The row of the only setting, without its name, score and costs."""
    return score_tables(Results(records)).split("\n\n")[1].splitlines()[2].split(" | ")[4:]


def test_layers_of_every_selection_and_why_and_what_ranked() -> None:
    assert cells(RECORDS) == ["2 (1–2), 2 (1–4)", "4/5", "1/4", "3/4 |"]
    assert cells(RECORDS[1:3]) == ["2, 4", "2/2", "1/2", "1/2 |"]
    assert cells(RECORDS[4:]) == ["–", "0/1", "–", "– |"]
    assert cells([looked_up(0, {1: 80, 2: 79, 3: 78, 4: 64}, {})])[0] == "1, …, 4"
    waited, settled = ({**answer(0, "asl@64"), "variance_ratio": [1.0, ratio]} for ratio in (0.05, 0.049))
    for one in (waited, settled):
        for name in NEW:
            one.pop(name, None)
    old = [check(ANSWERS, one) for one in (waited, settled | {"index": 1})]
    assert cells(old) == ["3", "2/2", "1/2", "– |"], "of results that an older version wrote"
    assert old[0]["selections"] == [{"layer": 3, "kept_tokens": 64}]


def test_selections_that_contradict_the_layer_are_refused() -> None:
    with pytest.raises(Unfit, match=r"selected_layer is 3, and not the last of its selections \[1, 2\]"):
        check(ANSWERS, RECORDS[0] | {"selected_layer": 3})
    with pytest.raises(Unfit, match="lookup has not an entry for each of eval_layers"):
        check(ANSWERS, RECORDS[0] | {"lookup": [0.5]})


def test_pictures_show_every_selection() -> None:
    (axes,) = plots.chosen_layers(Results(RECORDS)).axes
    bars = [(round(bar.get_x() + bar.get_width() / 2), bar.get_height(), bar.get_alpha()) for bar in axes.patches]
    assert [one for one in bars if one[1]] == [(1, 1, None), (2, 1, None), (4, 2, None), (1, 1, 0.4), (2, 2, 0.4)]
    assert [text.get_text() for text in axes.texts] == ["none chosen: 1"]

    figure = plots.decisions(Results(RECORDS))
    (axes,) = figure.axes
    falling = [line for line in axes.lines if line.get_label() == THRESHOLD]
    assert [list(line.get_xdata()) for line in falling] == [[1, 2], [2, 3, 4]]
    heights = [height for line in falling for height in line.get_ydata()]
    assert heights == pytest.approx([0.3, 0.255, 0.5, 0.425, 0.36125])
    dots = [list(zip(line.get_xdata(), line.get_ydata())) for line in axes.lines if line.get_marker() == "."]
    assert dots == [[(1, 0.9), (2, 0.72)], [(2, 0.2), (4, 0.361)], [(2, 0.2), (4, 0.362)], [(1, 0.31)], []]
    assert axes.get_ylabel() == "highest score of a far token"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["needle", THRESHOLD]
