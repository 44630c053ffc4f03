import builtins
import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from models import SMALL, left_padded, prompts, tiny

import flexasl
from flexasl.prefill import Prefill
from flexasl.report import Report, RowReport, SelectionReport

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def pruned_row(**changes):
    values = {
        "prompt_tokens": 4012,
        "kept_tokens": 512,
        "selected_layer": 18,
        "reason": "at layer 18 the rank variance fell to 0.28 of its peak, below tau=0.3",
        "scored_layers": tuple(range(8, 19)),
        "eval_layers": tuple(range(10, 19)),
        "variance": (2e3, 3e3, 5e3, 9e3, 1.2e4, 1.4e4, 9e3, 5e3, 3.9e3),
        "variance_ratio": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.64, 0.36, 0.28),
        "kept_positions": tuple(range(0, 480 * 7, 7)) + tuple(range(3980, 4012)),
    }
    return RowReport(**(values | changes))


def full_row(**changes):
    values = {
        "prompt_tokens": 40,
        "kept_tokens": 40,
        "selected_layer": None,
        "reason": "the prompt is no longer than the budget",
        "scored_layers": (),
        "eval_layers": (),
        "variance": (),
        "variance_ratio": (),
        "kept_positions": tuple(range(40)),
    }
    return RowReport(**(values | changes))


def make_report(*rows, **changes):
    values = {
        "policy": "asl",
        "config": {"select_tokens": 512, "tau": 0.3, "variance_reference": "peak", "kv_budget": None},
        "num_layers": 30,
        "rows": rows,
        "kv_tokens": (4012,) * 19 + (512,) * 11,
        "kv_bytes": 63 * 2**20,
        "kv_bytes_full": 90 * 2**20,
        "prefill_seconds": 7.812,
    }
    return Report(**(values | changes))


def test_text_names_the_decision_the_reason_and_the_saving():
    text = str(make_report(pruned_row(), full_row()))
    assert "row 0: 4,012 tokens in, 512 kept from layer 19 of 30 on (selected at layer 18)" in text
    assert "why: at layer 18 the rank variance fell to 0.28 of its peak, below tau=0.3" in text
    assert "threshold: rank variance below 0.3 of its peak value" in text
    assert "row 1: 40 tokens in, nothing pruned" in text
    assert "why: the prompt is no longer than the budget" in text
    assert "KV cache: 63.0 MiB of 90.0 MiB (70% of full)" in text
    assert "layers 0-18: 4,012, 19-29: 512" in text
    assert "prefill: 7.81 s" in text


def test_text_marks_the_chosen_layer_above_its_variance_and_ratio():
    lines = str(make_report(pruned_row())).splitlines()
    layers, variance, ratio = (
        next(line.split()[1:] for line in lines if line.split()[0] == name) for name in ("layer", "variance", "ratio")
    )
    assert layers == ["10", "11", "12", "13", "14", "15", "16", "17", "*18"]
    assert variance[layers.index("*18")] == "3900"
    assert ratio[layers.index("*18")] == "0.28"


def test_text_tells_selection_at_the_last_layer():
    text = str(make_report(pruned_row(selected_layer=29)))
    assert "512 selected at the last layer, 29" in text
    assert "from layer 30" not in text


def test_text_fits_100_columns():
    deep = pruned_row(
        selected_layer=79,
        reason="word " * 60,
        eval_layers=tuple(range(26, 80)),
        variance=(1.234e9,) * 54,
        variance_ratio=(1e-5,) * 54,
    )
    slots = tuple(100_000 + layer for layer in range(80))
    text = str(make_report(deep, num_layers=80, kv_tokens=slots))
    assert max(map(len, text.splitlines())) <= 100
    assert "*79" in text
    assert "100,079" in text


@pytest.mark.parametrize(("count", "closing"), [(8, None), (9, "... and 1 more row\n"), (20, "... and 12 more rows\n")])
def test_text_shows_at_most_eight_rows(count, closing):
    text = str(make_report(*[full_row()] * count))
    assert "row 7:" in text
    assert "row 8:" not in text
    assert closing in text if closing else "more row" not in text


def test_kv_share():
    assert make_report(pruned_row()).kv_share == pytest.approx(0.7)
    assert make_report(kv_bytes=0, kv_bytes_full=0).kv_share == 1.0


def test_to_dict_round_trips_through_strict_json():
    report = make_report(pruned_row(), full_row())
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["kv_share"] == report.kv_share
    assert data["config"] == report.config
    assert data["kv_tokens"] == list(report.kv_tokens)
    assert data["rows"][1]["selected_layer"] is None
    restored = {name: tuple(value) if isinstance(value, list) else value for name, value in data["rows"][0].items()}
    restored["selections"] = tuple(SelectionReport(**one) for one in restored["selections"])
    assert RowReport(**restored) == report.rows[0]


def test_to_dict_makes_scalars_plain_and_numbers_that_are_not_finite_none():
    row = pruned_row(
        kept_tokens=torch.tensor(512), variance=(torch.tensor(0.5), 1.0), variance_ratio=(math.inf, math.nan)
    )
    data = make_report(row, config={"tau": 0.3, "dtype": torch.float32}).to_dict()
    assert data["rows"][0]["kept_tokens"] == 512
    assert type(data["rows"][0]["kept_tokens"]) is int
    assert data["rows"][0]["variance"] == [0.5, 1.0]
    assert data["rows"][0]["variance_ratio"] == [None, None]
    assert data["config"]["dtype"] == "torch.float32"


def test_reports_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_report(full_row()).policy = "full"


def test_plot_writes_a_png_and_shows_curve_threshold_and_choice(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    figure = make_report(full_row(), pruned_row()).plot(path, row=1)
    image = path.read_bytes()
    assert image.startswith(PNG_MAGIC)
    assert image[12:16] == b"IHDR" and int.from_bytes(image[16:20]) >= 1000
    above, below = figure.axes
    curve = above.lines[0]
    assert list(curve.get_xdata()) == list(range(10, 19))
    assert list(curve.get_ydata()) == list(pruned_row().variance_ratio)
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["variance ratio", "tau = 0.3", "selected at layer 18"]
    shares = [bar.get_height() for bar in below.patches]
    assert shares[-1] == max(shares) == pytest.approx(32 / 41)
    kept = sum(bar.get_height() * bar.get_width() for bar in below.patches)
    assert kept == pytest.approx(512)


LOOK_UPS = {"eval_layers": (5, 6, 7, 8, 9, 10), "lookup": (0.05, 0.04, 1.0, 0.8, 0.64, 0.57)}


def looked_up_row(**changes):
    made = (SelectionReport(layer=7, kept_tokens=1323), SelectionReport(layer=10, kept_tokens=512))
    told = {"variance": (), "variance_ratio": (), "selected_layer": 10, "selections": made, "ranked_by": "Who\x1b?"}
    return pruned_row(**(LOOK_UPS | told | changes))


def test_plot_shows_look_ups_and_every_stage():
    pytest.importorskip("matplotlib")
    stage = {"tokens": 0.33, "tau": 0.3, "min_layer": 5, "max_layer": 6}
    config = {"tau": 0.5, "min_layer": 9, "max_layer": 40, "stages": [stage]}
    report = make_report(full_row(), looked_up_row(), config=config)
    assert report.thresholds == [(0.3, 5, 6), (0.5, 9, 40)]
    assert Report.from_dict(report.to_dict()) == report
    figure = report.plot(row=1)
    above = figure.axes[0]
    curve, first, last, *others = above.lines
    assert (tuple(curve.get_xdata()), tuple(curve.get_ydata())) == (LOOK_UPS["eval_layers"], LOOK_UPS["lookup"])
    assert list(first.get_xdata()) == [5, 6] and list(first.get_ydata()) == pytest.approx([0.3, 0.255])
    assert list(last.get_xdata()) == list(range(9, 30)), "the model has 30 layers"
    assert [0.5 * 0.85**layer for layer in range(21)] == pytest.approx(list(last.get_ydata()))
    assert {7, 10} == {line.get_xdata()[0] for line in others}
    assert {1.0, 0.57} <= {line.get_ydata()[0] for line in others}, "a dot at every selection"
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["look-up", "threshold of each stage", "selected at layers 7 (1,323 tokens), 10"]
    assert above.get_ylabel() == "highest score of a far token" and "found its answer" in above.get_title(loc="left")
    assert figure.get_suptitle().endswith("\nranked by: Who\\x1b?")
    for other in (make_report(looked_up_row(), config={}), make_report(pruned_row(), config=config)):
        assert other.thresholds == []


@pytest.mark.parametrize("stages", [0.5, [0.5], [{"tau": "half"}], [{"min_layer": -1}], {"tau": 0.5}])
def test_a_stored_report_with_other_stages_is_refused(stages):
    data = make_report(looked_up_row()).to_dict()
    data["config"]["stages"] = stages
    with pytest.raises(flexasl.FlexASLError, match=r"config.stages"):
        Report.from_dict(data)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["my $\\no$ policy", "a\x1b[31m", "$"])
def test_plot_with_any_name_of_a_policy(name, tmp_path):
    report = dataclasses.replace(make_report(pruned_row()), policy=name)
    title = report.plot(tmp_path / "why.png").get_suptitle()
    assert title.isprintable() and title.startswith(name.replace("\x1b", "\\x1b"))


def test_plot_of_a_row_without_scores_says_so():
    pytest.importorskip("matplotlib")
    above, below = make_report(full_row(kept_positions=())).plot().axes
    assert [text.get_text() for text in above.texts] == ["the rule did not look at this row"]
    assert [text.get_text() for text in below.texts] == ["every token was kept"]
    assert not above.lines


@pytest.mark.parametrize("row", [-1, 2])
def test_plot_of_a_missing_row_names_the_rows(row):
    with pytest.raises(ValueError, match=f"row={row} is not in this report; rows are 0 to 1"):
        make_report(full_row(), full_row()).plot(row=row)


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "flexasl.picture", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"flexasl\[plot\]"):
        make_report(full_row()).plot()


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, flexasl.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_positions_of_a_prompt_that_was_not_pruned_are_made_when_they_are_read(monkeypatch):
    monkeypatch.setattr(Prefill, "kept_positions", None)
    with flexasl.patch(tiny(), SMALL) as patch:
        tiny()(**left_padded(prompts(20, 12)))
    report = patch.report
    assert [vars(row)["kept_positions"] for row in report.rows] == [range(20), range(12)]
    copies = pickle.loads(pickle.dumps(report)), copy.deepcopy(report), Report.from_dict(report.to_dict())
    assert all(one.rows[1] == report.rows[1] for one in copies)
    assert [row.kept_positions for row in report.rows] == [tuple(range(20)), tuple(range(12))]
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["kept_positions"] == list(range(12))
    assert "kept_positions=(0, 1, 2, 3, 4" in repr(report.rows[1])


def test_a_curve_is_called_after_what_ranked():
    assert pruned_row().curve_title == "Has the ranking of tokens settled?"
    assert pruned_row(lookup=(0.1,) * 9, ranked_by="Who?").curve_title == "Has the question found its answer?"
    by_last = pruned_row(lookup=(0.1,) * 9, ranked_by="the last 32 tokens; no question was found")
    assert by_last.curve_title == "Have the last tokens found what they look for?"
