"""A chat whose second turn asks about the first one's document, which was pruned."""

import pytest
import torch

import flexasl
from flexasl import embedded
from flexasl.tools.text import magic_number, needle_prompt


@pytest.mark.slow
@pytest.mark.parametrize("later_turns", ["keep", "prune"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_second_turn_answers_from_the_pruned_document(later_turns: str, seed: int) -> None:
    model, tokenizer = embedded.load()
    fact = magic_number(seed)
    message = needle_prompt(tokenizer, 1000, 0.4, fact.needle, f"Remember this: {fact.question}", seed)
    # The first answer does not give the number away.
    turns = [{"role": "user", "content": message}, {"role": "assistant", "content": "Yes, I have read the text."}]
    first = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = tokenizer.apply_chat_template([*turns, {"role": "user", "content": fact.question}], tokenize=False)
    whole += f"<|im_start|>assistant\n{fact.answer_prefix}"
    assert whole.startswith(first)
    head, ids = (tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in (first, whole))
    assert torch.equal(ids[:, : head.shape[1]], head)
    with flexasl.patch(model, flexasl.ASLConfig(select_tokens=256, later_turns=later_turns)) as patch:
        cache = model(head, use_cache=True).past_key_values
        report = patch.report
        out = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert report.rows[0].kept_tokens == 256 and min(report.kv_tokens) == 256
    assert fact.answer in tokenizer.decode(out[0, ids.shape[1] :])
