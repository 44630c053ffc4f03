"""lm-evaluation-harness on a patched model, with a task of its own kind on a local file."""

import json
from pathlib import Path

import pytest

import flexasl
from flexasl import embedded, evaluation

pytest.importorskip("lm_eval")

NEW_TOKENS = 8
LENGTHS = 700, 500


def needles(folder: Path, samples: list[evaluation.Sample]) -> dict:
    """What lm_eval calls a task: prompts and answers in a file, right where the number is."""
    lines = [json.dumps({"prompt": sample.prompt, "answer": sample.references[0]}) for sample in samples]
    (folder / "needles.jsonl").write_text("\n".join(lines))
    return {
        "task": "needles",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "needles.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [r"\D"]}],
    }


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_are_those_of_the_patched_model(batch_size: int, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = embedded.load()
    samples = [evaluation.build("needle", tokenizer, length, 0, at) for at, length in enumerate(LENGTHS)]
    with flexasl.patch(model, flexasl.ASLConfig(select_tokens=128)) as patch:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = simple_evaluate(model=lm, tasks=[needles(tmp_path, samples)], log_samples=True, bootstrap_iters=0)
        assert len(patch.report.rows) == batch_size and patch.report.rows[0].kept_tokens == 128
        told = [answer["resps"][0][0].strip() for answer in results["samples"]["needles"]]
        expected = []
        for sample in samples:
            ids = tokenizer(sample.prompt, add_special_tokens=False, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            expected.append(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True).strip())
    assert told == expected
    assert results["results"]["needles"]["exact_match,none"] == 1.0
