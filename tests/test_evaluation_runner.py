"""Evaluations from plan to report: what is refused, what is stored, and what a kill leaves behind."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from models import tiny
from tiny_chat import tiny_tokenizer

import flexasl
from flexasl import cli, run
from flexasl.errors import FlexASLError
from flexasl.integrations.transformers.models import decoder_layers
from flexasl.report import Report, RowReport
from flexasl.tools.evaluation import Sources, build, evaluate, plan, report, runner
from flexasl.tools.evaluation.costs import layer_costs, prefill_share
from flexasl.tools.evaluation.plans import parse_lengths, parse_policies
from flexasl.tools.evaluation.reporting import RANKED
from flexasl.tools.evaluation.samples import RULES
from flexasl.tools.evaluation.storage import read_all
from flexasl.tools.evaluation.tables import Results, score_tables
from flexasl.tools.text import encode

TABLES = ("scores.md", "times.md", "results.jsonl")
TIMES = ("first_token_seconds", "total_seconds")
SMALL: dict[str, Any] = {
    "tasks": ["needle", "passkey"],
    "lengths": [200, 300],
    "samples": 2,
    "policies": ["asl", "fixed_layer:layer=1", "full"],
    "budgets": [64],
}
ARGUMENTS = ["--tasks", "needle,passkey", "--lengths", "200,300", "--samples", "2", "--budget", "64"]
ARGUMENTS += ["--policies", "asl,fixed_layer:layer=1,full"]
ANSWERS = 2 * 2 * 2 * 3


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing stopped."""
    out = tmp_path_factory.mktemp("finished")
    assert evaluate(plan(**SMALL), *loaded, out)
    report(out)
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(out: Path) -> tuple[str, list[dict[str, Any]]]:
    """The tables of scores, and the results without what a clock said."""
    results = Results(read_all(out, runner.ANSWERS, runner.answer_key))
    untimed = [{name: value for name, value in line.items() if name not in TIMES} for line in results.records]
    return score_tables(results), untimed


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `flexasl eval` says of bad input."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", *arguments])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("flexasl: ") and err.count("\n") == 1, err
    return err


def test_results_are_the_models_answers(finished: Path, loaded) -> None:
    model, tokenizer = loaded
    results = lines(finished / "results.jsonl")
    assert len(results) == ANSWERS
    assert {line["setting"] for line in results} == {"full", "asl@64", "fixed_layer:layer=1@64"}
    sample = build("passkey", tokenizer, 300, index=1)
    stored = {
        line["setting"]: line
        for line in results
        if (line["task"], line["length"], line["index"]) == ("passkey", 300, 1)
    }
    ids = encode(tokenizer, sample.prompt)
    full = run.answer(model, tokenizer, ids, max_new_tokens=6)
    assert stored["full"]["answer"] == full.text and stored["full"]["prompt_tokens"] == len(ids)
    config, policy = flexasl.ASLConfig(select_tokens=64), flexasl.policies.FixedLayer(layer=1)
    pruned = run.answer(model, tokenizer, ids, max_new_tokens=6, config=config, policy=policy)
    line = stored["fixed_layer:layer=1@64"]
    assert (line["answer"], line["selected_layer"], line["kept_tokens"]) == (pruned.text, 1, 64)
    assert line["kv_share"] == pruned.report.kv_share < 1 and 0.3 < line["counted_prefill"] < 0.7
    assert stored["full"]["counted_prefill"] == 1 and line["ranked_by"] == "the last 32 tokens"
    line, config = stored["asl@64"], flexasl.ASLConfig(select_tokens=64)
    asked = {"policy": "asl", "question": line["ranked_by"]}
    pruned = run.answer(model, tokenizer, ids, max_new_tokens=6, config=config, **asked)
    row = pruned.report.rows[0]
    assert row.ranked_by == line["ranked_by"] == "What is the pass key?" and line["answer"] == pruned.text
    assert line["selections"] == [{"layer": one.layer, "kept_tokens": one.kept_tokens} for one in row.selections]
    assert line["eval_layers"] == list(row.eval_layers) and line["lookup"] == pytest.approx(row.lookup, rel=1e-5)
    assert line["thresholds"] == [[0.4, 0, 1], [0.2, 2, 3]] and line["variance_ratio"] == []
    prompts = lines(finished / "prompts-0.jsonl")
    assert sample.to_dict() in prompts and len(prompts) == 8


def test_full_cache_is_run_once_for_each_prompt(loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    answer = run.answer

    def counted(model, tokenizer, ids, **rest):
        runs.append(rest.get("policy"))
        return answer(model, tokenizer, ids, **rest)

    monkeypatch.setattr(run, "answer", counted)
    monkeypatch.setattr(run, "warm_up", lambda *_, **__: None)
    few = {"tasks": ["passkey"], "lengths": [200], "samples": 2, "policies": ["asl", "full", "snapkv"]}
    evaluate(plan(**few, budgets=[64, 96]), *loaded, tmp_path)
    assert len(runs) == 2 * 5 and runs.count(None) == 2
    evaluate(plan(**few, budgets=[64, 96, 128]), *loaded, tmp_path)
    assert len(runs) == 10 + 2 * 2 and runs.count(None) == 2, "only the new budget is run"


@pytest.mark.parametrize("cut", [1, 60])
def test_resumed_after_an_interrupt(loaded, finished: Path, tmp_path: Path, cut: int) -> None:
    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        assert stage == "prompts" or total == ANSWERS
        if (stage, done) == ("answers", 7):
            raise Stopped

    with pytest.raises(Stopped):
        evaluate(plan(**SMALL), *loaded, tmp_path, on_progress=stop)
    answers = tmp_path / "answers-0.jsonl"
    before = answers.read_bytes()
    assert before.count(b"\n") == 7
    answers.write_bytes(before[:-cut])  # the kill came while the last line was written

    seen: list[int] = []
    assert evaluate(plan(**SMALL), *loaded, tmp_path, on_progress=lambda stage, done, total: seen.append(done))
    assert answers.read_bytes().startswith(before[: before.rfind(b"\n", 0, -1) + 1]), "nothing is redone"
    assert answers.read_bytes().count(b"\n") == ANSWERS
    assert told(tmp_path) == told(finished)


def test_killed_and_resumed(folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["eval", *ARGUMENTS, "--model", str(folder), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "flexasl.cli", *arguments], env=environment) as process:
        answers = out / "answers-0.jsonl"
        while process.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") >= 3):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    held = answers.read_bytes()
    assert 3 <= held.count(b"\n") < ANSWERS and not (out / "report.md").exists()
    whole = held[: held.rfind(b"\n") + 1]
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert answers.read_bytes().startswith(whole) and answers.read_bytes().count(b"\n") == ANSWERS
    assert (out / "scores.md").read_bytes() == (finished / "scores.md").read_bytes()
    assert told(out) == told(finished)
    assert "Not finished" not in (out / "report.md").read_text()
    assert f"Report: {out / 'report.md'}" in capsys.readouterr().out
    made = [(out / name).read_bytes() for name in TABLES]
    report(out)
    assert [(out / name).read_bytes() for name in TABLES] == made


def test_processes_share_the_prompts(loaded, finished: Path, tmp_path: Path) -> None:
    assert not evaluate(plan(**SMALL), *loaded, tmp_path, rank=1, world_size=3)
    assert not evaluate(plan(**SMALL), *loaded, tmp_path, rank=0, world_size=3)
    assert evaluate(plan(**SMALL), *loaded, tmp_path, rank=2, world_size=3), "the last one finds the plan done"
    shares = [lines(tmp_path / f"answers-{rank}.jsonl") for rank in range(3)]
    assert sum(map(len, shares)) == ANSWERS and min(map(len, shares)) >= 6
    assert told(tmp_path) == told(finished)
    before = [(tmp_path / f"answers-{rank}.jsonl").read_bytes() for rank in range(3)]
    assert evaluate(plan(**SMALL), *loaded, tmp_path), "one process goes on with what three did"
    assert [(tmp_path / f"answers-{rank}.jsonl").read_bytes() for rank in range(3)] == before


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_prompt_has_one_process(world_size: int) -> None:
    whole = plan("ruler", samples=5, lengths=[100, 200])
    shares = [whole.items(rank, world_size) for rank in range(world_size)]
    assert sorted(map(str, itertools.chain(*shares))) == sorted(map(str, whole.items()))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 + len(whole.items()) // world_size**2
    for share in shares:
        assert {item.length for item in share} == {100, 200}, "no process has all the long prompts"


def test_report_has_its_pictures(finished: Path) -> None:
    page = (finished / "report.md").read_text()
    for name in ("pareto.png", "needle.png", "layers.png", "decisions.png"):
        assert f"]({name})" in page and (finished / name).read_bytes().startswith(b"\x89PNG")
    assert (finished / "scores.md").read_text().rstrip() in page
    assert (finished / "times.md").read_text().rstrip() in page
    scores = (finished / "scores.md").read_text().splitlines()
    assert scores[2].startswith("**Beyond this model**") and scores[2].endswith("with nothing else to average.")
    rows = [line.split(" | ")[0] for line in scores[6:9]]
    assert rows == ["| full", "| asl@64", "| fixed_layer:layer=1@64"], "the full cache stands first"
    assert scores[6] == "| full | 0.00 [0.00, 0.00] | 1.00 | 1.00 | – | 0/8 | – | – |"
    assert scores[7].endswith(" | 8/8 |") and scores[8].endswith(" | 1 | 8/8 | – | 0/8 |")
    assert "- ranked by: the question under adaptive selection, the window under other policies" in page
    assert "- after the question: nothing\n- start of the answer: in the prompt\n" in page


def test_without_selection_there_is_no_picture_of_layers(loaded, tmp_path: Path) -> None:
    evaluate(plan(tasks=["vt"], lengths=[500], samples=1, policies=["snapkv"], budgets=[64]), *loaded, tmp_path)
    report(tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"pareto.png"}
    assert "needle.png" not in (tmp_path / "report.md").read_text()


def test_unfinished_report_says_so(finished: Path, tmp_path: Path) -> None:
    for name in ("run.json", "prompts-0.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    answers = (finished / "answers-0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers-0.jsonl").write_text("".join(answers[:7]))
    report(tmp_path)
    assert f"**Not finished:** {ANSWERS - 7} answers are missing" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "holds results with seed=0, not 1"),
        ({"sources": Sources(depths=(0.5,))}, "holds results with depths="),
    ],
)
def test_other_results_are_not_mixed_in(loaded, finished: Path, change: dict, words: str) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(FlexASLError, match=words):
        evaluate(plan(**SMALL, **change), *loaded, finished)
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_another_chat_template_is_not_mixed_in(loaded, finished: Path) -> None:
    with pytest.raises(FlexASLError, match="holds results with chat_template="):
        evaluate(plan(**SMALL), loaded[0], tiny_tokenizer(chat=False), finished)


def test_folder_in_use(loaded, tmp_path: Path) -> None:
    def again(*_: Any) -> None:
        evaluate(plan(**SMALL), *loaded, tmp_path)

    with pytest.raises(FlexASLError, match="is in use by another evaluation"):
        evaluate(plan(**SMALL), *loaded, tmp_path, on_progress=again)


def test_damaged_results(loaded, finished: Path, tmp_path: Path) -> None:
    for name in ("run.json", "answers-0.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    answers = tmp_path / "answers-0.jsonl"
    first, rest = answers.read_text().split("\n", 1)
    answers.write_text(f"{first[:50]}\n{rest}")
    with pytest.raises(FlexASLError, match=r"answers-0\.jsonl, line 1 is damaged"):
        report(tmp_path)


def test_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FlexASLError, match="holds no evaluation"):
        report(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policies": ["fixed_layer:layer=9"]}, "layer=9 is not a layer of this model"),
        ({"policies": ["asl:max_layer=6"]}, "max_layer=6 is beyond the model"),
        ({"lengths": [1020]}, r"1020 tokens.*context of 1024 tokens"),
        ({"lengths": [40]}, r"task='needle': length=40 is too short; give at least \d+ tokens"),
    ],
)
def test_what_does_not_fit_the_model_never_runs(
    loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, words: str
) -> None:
    monkeypatch.setattr(run, "answer", None)
    with pytest.raises(FlexASLError, match=words):
        evaluate(plan(**(SMALL | change)), *loaded, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "rulers"], "suite='rulers' is not known; give one of ruler, infinitebench, niah, recall, quick"),
        (["--tasks", "needle,nidle"], "task='nidle' is not known; give one of needle, niah_single_1,"),
        (["--tasks", "qa_2"], "task='qa_2' needs questions in HotpotQA's format; give such a file with --qa-file"),
        (["--tasks", "math_find"], "task='math_find' needs InfiniteBench's file math_find.jsonl; give its folder with"),
        (["--policies", "asl,best"], "policy='best' is not known; give one of asl, "),
        (
            ["--policies", "asl:layer=3"],
            "policy='asl:layer=3': layer is not a setting of asl; its settings are kv_budget,",
        ),
        (["--policies", "asl:select_tokens=3"], "select_tokens is not a setting of asl; --budget sets it"),
        (["--policies", "asl:tau"], "policy='asl:tau': 'tau' is not a setting; give name=value"),
        (["--policies", "asl:tau=2"], "tau=2"),
        (["--policies", "full:layer=2"], "policy='full:layer=2' is the unpatched model"),
        (["--policies", "asl,,full"], "policies='asl,,full' has an empty entry"),
        (["--lengths", "1q"], "length=1q is not a number of tokens; give one such as 4096 or 4k"),
        (["--lengths", "0"], "length=0 is not a number of tokens; give a whole number of at least 1"),
        (["--budget", "many"], "budget=many is not an amount"),
        (["--budget", "16"], "select_tokens=16 does not exceed window=32"),
        (["--samples", "0"], "samples=0 is too few"),
        (["--rank-by", "both"], "'--rank-by': 'both' is not one of 'policy', 'question', 'window'"),
        (["--after-question", "none"], "'--after-question': 'none' is not one of 'rules'"),
        (["--policies", "asl:stages=half"], "stages holds 'half'; give texts such as '0.5@5-9'"),
        (["--policies", "paper:stages=0.5"], "stages='0.5' does not go with settled_by='variance'"),
        (["--policies", "snapkv:stages=0.5"], "stages=(Stage(tokens=0.5),) would have no effect under policy 'snapkv'"),
        (["--samples", "1000001"], "samples=1000001 is too large; give at most 1000000"),
        (["--samples", "300000"], "samples=300000 makes 1,200,000 prompts in all; give at most 250,000"),
        (["--depths", "deep"], "depths='deep' are not shares of the document"),
        (["--haystack", "none.txt"], "none.txt does not exist"),
        (["--qa-file", "none.json"], "none.json does not exist"),
        (["--infinitebench", "none"], "infinitebench=none is not a folder"),
    ],
)
def test_bad_input_is_one_line_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(run, "load_model", None)
    assert words in refused(capsys, *arguments)


def test_suite_leaves_out_what_lacks_a_file() -> None:
    checked = plan("ruler")
    assert len(checked.tasks) == 11 and set(checked.left_out) == {"qa_1", "qa_2"}
    assert "--qa-file" in checked.left_out["qa_1"]
    assert checked.settings[0].label == "full" and len(checked.settings) == 1 + 3 * 2


def test_policies_on_a_command_line() -> None:
    given = parse_policies("asl:tau=0.3,min_layer=10, fixed_layer:layer=2,paper,full")
    assert given == ["asl:tau=0.3,min_layer=10", "fixed_layer:layer=2", "paper", "full"]
    full, asl, fixed, paper = plan(policies=given, budgets=[0.25]).settings
    assert (full.policy, full.config) == (None, None)
    assert asl.config == flexasl.ASLConfig(select_tokens=0.25, tau=0.3, min_layer=10) and asl.policy.name == "asl"
    assert fixed.policy.layer == 2 and fixed.config == flexasl.ASLConfig(select_tokens=0.25)
    assert paper.config == flexasl.ASLConfig.paper(select_tokens=0.25) and paper.label == "paper@0.25"
    every = plan(policies=list(flexasl.policies.POLICIES), budgets=[64]).settings
    assert len(every) == len(flexasl.policies.POLICIES), "each by its name, and the full cache once"


@pytest.mark.parametrize(("rank_by", "ranked"), [("policy", "1100"), ("question", "1111"), ("window", "0000")])
def test_what_ranks_is_chosen(loaded, tmp_path: Path, rank_by: str, ranked: str) -> None:
    given = ["asl", "asl_two_pass:kv_budget=64", "paper", "snapkv"]
    few: dict[str, Any] = {"tasks": ["passkey"], "lengths": [200], "samples": 1, "policies": given, "budgets": [64]}
    assert "".join(str(int(one.by_question)) for one in plan(**few, rank_by=rank_by).settings[1:]) == ranked
    evaluate(plan(**few, rank_by=rank_by), *loaded, tmp_path)
    texts = [line["ranked_by"] for line in lines(tmp_path / "answers-0.jsonl")]
    asked, last = "What is the pass key?", "the last 32 tokens"
    assert texts == ["", *(asked if one == "1" else last for one in ranked)]
    report(tmp_path)
    assert f"- ranked by: {RANKED[rank_by]}\n" in (tmp_path / "report.md").read_text()
    with pytest.raises(FlexASLError, match=f"holds results with rank_by='{rank_by}', not "):
        evaluate(plan(**few, rank_by="window" if rank_by == "policy" else "policy"), *loaded, tmp_path)


def test_how_prompts_end_is_chosen(folder: Path, loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--after-question", "rules", "--no-answer-prefix", "--rank-by", "question"]
    few = ["--tasks", "passkey", "--lengths", "900", "--samples", "1", "--budget", "400", "--policies", "asl,snapkv"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", *few, *chosen, "--model", str(folder), "--out", str(tmp_path)])
    assert caught.value.code == 0 and "| 1/1 |" in capsys.readouterr().out
    (prompt,) = lines(tmp_path / "prompts-0.jsonl")
    assert prompt["prompt"].endswith(f"What is the pass key?\n\n{RULES[0]} {RULES[1]}<end><assistant>")
    assert prompt["prompt_tokens"] <= 900 and prompt["max_new_tokens"] == 6 + 32
    assert {line["ranked_by"] for line in lines(tmp_path / "answers-0.jsonl")} == {"", "What is the pass key?"}
    page = (tmp_path / "report.md").read_text()
    assert "- ranked by: the question\n- question: after the text\n- after the question: rules\n" in page
    assert "\n- start of the answer: left out\n" in page
    same = {"tasks": ["passkey"], "lengths": [900], "rank_by": "question", "after_question": "rules"}
    for other, words in (
        ({}, "answer_prefix=False"),
        ({"after_question": None}, "after_question='rules'"),
        ({"answer_prefix": False, "question_first": True}, "question_first=False"),
    ):
        with pytest.raises(FlexASLError, match=f"holds results with {words}"):
            evaluate(plan(**same | other), *loaded, tmp_path)
    with pytest.raises(FlexASLError, match="rank_by='both' is not known; give 'policy' or 'question' or 'window'"):
        plan(rank_by="both")
    with pytest.raises(FlexASLError, match="after_question='none' is not known; give None or 'rules-30' or 'rules'"):
        plan(after_question="none")
    with pytest.raises(FlexASLError, match=r"answer_prefix='no' is .*; give True or False"):
        plan(answer_prefix="no")
    with pytest.raises(FlexASLError, match="question_first=True does not go with task 'longbook_qa_eng'"):
        book = {"tasks": ["longbook_qa_eng"], "sources": Sources(infinitebench=tmp_path)}
        (tmp_path / "longbook_qa_eng.jsonl").write_text('{"context": "a", "input": "b", "answer": ["c"]}\n')
        plan(**book, samples=1, question_first=True)


def test_settings_that_policies_start_from() -> None:
    base = flexasl.ASLConfig(select_tokens=99, tau=0.7, max_layer=4)
    given = ["asl", "asl:tau=0.3", "fixed_layer", "paper"]
    _, asl, own, fixed, paper = plan(policies=given, budgets=[64], config=base).settings
    assert asl.config == base.replace(select_tokens=64) and own.config == base.replace(select_tokens=64, tau=0.3)
    assert fixed.config == flexasl.ASLConfig(select_tokens=64) and paper.config.max_layer is None


def test_results_of_other_settings_are_not_mixed_in(loaded, tmp_path: Path) -> None:
    few = {"tasks": ["passkey"], "lengths": [200], "samples": 1, "policies": ["full"]}
    evaluate(plan(**few), *loaded, tmp_path)
    with pytest.raises(flexasl.FlexASLError, match=r"holds results with config=.*; give another folder"):
        evaluate(plan(**few, config=flexasl.ASLConfig(tau=0.3)), *loaded, tmp_path)


def test_answers_can_be_cut(loaded, tmp_path: Path) -> None:
    short = plan(**SMALL, answer_tokens=2)
    evaluate(short, *loaded, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "answers-0.jsonl").read_text().splitlines()]
    assert len(records) == ANSWERS and max(record["new_tokens"] for record in records) == 2
    with pytest.raises(FlexASLError, match="answer_tokens=2, not None"):
        evaluate(plan(**SMALL), *loaded, tmp_path)
    assert plan(**SMALL, answer_tokens=1000).max_new_tokens("passkey") == 6
    assert plan().answer_tokens == 64 and plan(tasks=["niah_multivalue"]).max_new_tokens("niah_multivalue") == 128
    assert plan(answer_tokens=100).answer_tokens == 100
    with pytest.raises(FlexASLError, match="answer_tokens=0 is too few"):
        plan(**SMALL, answer_tokens=0)


def test_caches_in_eight_bits_are_not_decoded_together(loaded, tmp_path: Path) -> None:
    with pytest.raises(FlexASLError, match=r"together=True .* 'asl:kv_dtype=int8@64' excludes"):
        evaluate(plan(**SMALL | {"policies": ["asl:kv_dtype=int8"]}), *loaded, tmp_path / "none", together=True)
    assert not (tmp_path / "none").exists()


def test_lengths_on_a_command_line() -> None:
    assert parse_lengths("1k,1.5K, 4096") == [1024, 1536, 4096]


def report_of(prompt: int, ran: tuple[int, ...], kept: tuple[int, ...], reread: int = 0) -> Report:
    told = {"kept_positions": kept, "layer_tokens": ran, "reread_layers": reread}
    row = RowReport(prompt_tokens=prompt, kept_tokens=len(kept) or prompt, selected_layer=3, reason="", **told)
    sizes = {"kv_tokens": (), "kv_bytes": 0, "kv_bytes_full": 0, "prefill_seconds": 0.0}
    return Report(policy="asl", config={}, num_layers=6, rows=(row,), **sizes)


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_counted_cost_is_that_of_the_products(family: str) -> None:
    model = tiny(family)
    kept = (0, 3, *range(50, 70), *range(150, 200))
    window = 48 if family == "mistral_sliding" else 10**9

    def count(positions: tuple[int, ...]) -> int:
        linear = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96  # query and output, key and value, the three of the MLP
        pairs = sum(0 <= query - key < window for query in positions for key in positions)
        return 2 * linear * len(positions) + 2 * 2 * 4 * 16 * pairs

    full, few = count(tuple(range(200))), count(kept)
    costs, pruned = layer_costs(model), (200,) * 4 + (len(kept),) * 2
    assert prefill_share(costs, report_of(200, pruned, kept)) == pytest.approx((4 * full + 2 * few) / (6 * full))
    assert prefill_share(costs, report_of(200, (200,) * 6, ())) == 1
    twice = prefill_share(costs, report_of(200, pruned, kept, reread=4))
    assert twice == pytest.approx((4 * full + 6 * few) / (6 * full))
    stepwise = prefill_share(costs, report_of(200, (200, 200, 100, 100, *pruned[-2:]), kept))
    half = count(tuple(range(0, 200, 2)))
    assert stepwise == pytest.approx((2 * full + 2 * half + 2 * few) / (6 * full))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt"])
def test_layers_are_found_whatever_their_list_is_called(family: str) -> None:
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(d_model=64, n_layers=6, n_heads=4, vocab_size=64)
    model = MptForCausalLM(config).eval() if family == "mpt" else tiny(family)
    assert len(decoder_layers(model)) == len(layer_costs(model)) == 6
    called: list[None] = []
    run.answer(model, tiny_tokenizer(), [1, 2, 3], max_new_tokens=1, on_layer=lambda: called.append(None))
    assert len(called) == 6


def test_stored_prompt_is_what_is_answered(loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template may hold today's date: what was stored counts, and not what would be built now."""
    few = plan(tasks=["passkey"], lengths=[200], samples=1, policies=["full"])
    evaluate(few, *loaded, tmp_path)
    prompt = lines(tmp_path / "prompts-0.jsonl")[0]
    answer = lines(tmp_path / "answers-0.jsonl")[0]["answer"]
    (tmp_path / "answers-0.jsonl").unlink()
    shorter = prompt | {"prompt": prompt["prompt"][-100:]}
    (tmp_path / "prompts-0.jsonl").write_text(json.dumps(shorter) + "\n")
    monkeypatch.setattr(runner, "build", None)
    evaluate(few, *loaded, tmp_path)
    assert lines(tmp_path / "answers-0.jsonl")[0]["answer"] != answer


def test_import_is_light() -> None:
    code = "import flexasl, sys; print('flexasl.tools' in sys.modules); import flexasl.evaluation; "
    code += "print([name for name in ('transformers', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["False", "[]"]
