"""Pictures of an evaluation can be read: nothing is cut off by a frame, and no words lie over others."""

import itertools

import pytest

pytest.importorskip("matplotlib")

from matplotlib.collections import PathCollection

from flexasl.tools.evaluation import plots
from flexasl.tools.evaluation.tables import Results


def _record(policy: str, budget: float | None, index: int, score: float, cost: float, timed: bool) -> dict:
    return {
        "task": "needle",
        "length": 1024,
        "index": index,
        "setting": policy if budget is None else f"{policy}@{budget}",
        "policy": policy,
        "budget": budget,
        "score": score,
        "counted_prefill": cost,
        "first_token_seconds": 2 * cost if timed else None,
    }


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("budgets", [[256], [0.25, 128, 256, 512]])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_pareto_is_legible(timed: bool, budgets: list[float], score: float) -> None:
    records = [_record("full", None, index, 1.0, 1.0, timed) for index in range(3)]
    for (place, policy), (step, budget), index in itertools.product(
        enumerate(("asl", "fixed_layer", "snapkv")), enumerate(budgets), range(3)
    ):
        cost = 1.0 if policy == "snapkv" else 0.6 + 0.03 * step + 0.001 * place
        records.append(_record(policy, budget, index, score, cost, timed))
    figure = plots.pareto(Results(records))
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert not axes.texts, "words at points lie over each other"
        frame = axes.get_window_extent()
        for points in axes.collections:
            for place in axes.transData.transform(points.get_offsets()) if isinstance(points, PathCollection) else ():
                assert frame.x0 + 10 < place[0] < frame.x1 - 10 and frame.y0 + 10 < place[1] < frame.y1 - 10
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    sizes = [f"budget {budget}" for budget in budgets] if len(budgets) > 1 else []
    assert named == ["full", "asl", "fixed_layer", "snapkv", "beaten by none", *sizes]
    words = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(words, 2))
    assert all(box.x1 < figure.bbox.x1 and box.y0 > 0 for box in words)
