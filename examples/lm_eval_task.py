"""lm-evaluation-harness on a patched model, offline: `python examples/lm_eval_task.py`.

A task is made of a local file of prompts. The tasks that lm-eval brings are run likewise, by their names.
"""

import json
import tempfile
from pathlib import Path

import flexasl
from flexasl import embedded
from flexasl.tools.text import magic_number, needle_prompt

PROMPTS, TOKENS = 4, 700


def task(tokenizer, folder: Path) -> dict:
    """What lm-eval calls a task: prompts and answers in a file, right where the number is."""
    lines = []
    for seed in range(PROMPTS):
        fact = magic_number(seed)
        message = needle_prompt(tokenizer, TOKENS, 0.5, fact.needle, fact.question, seed)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        lines.append(json.dumps({"prompt": prompt + fact.answer_prefix, "answer": fact.answer}))
    (folder / "needles.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {
        "task": "needles",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "needles.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [r"\D"]}],
    }


def main() -> None:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise SystemExit("this example needs lm-eval; install it with: pip install lm-eval") from error
    model, tokenizer = embedded.load()
    with tempfile.TemporaryDirectory() as folder:
        needles = task(tokenizer, Path(folder))
        for select_tokens in (1.0, 128):
            config = flexasl.ASLConfig(select_tokens=select_tokens)
            with flexasl.patch(model, config, tokenizer=tokenizer) as patch:
                lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
                results = simple_evaluate(model=lm, tasks=[needles], bootstrap_iters=0)
                right = results["results"]["needles"]["exact_match,none"]
                print(f"select_tokens={select_tokens}: {right:.2f} right; cache {patch.report.kv_share:.0%} of full")


if __name__ == "__main__":
    main()
