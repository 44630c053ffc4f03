"""Prompts of different lengths in one batch: `python examples/batch.py`.

Each row is pruned by its own question, at its own layer, as if it were alone.
"""

import flexasl
from flexasl import embedded
from flexasl.tools.text import magic_number, needle_prompt

LENGTHS = (1200, 700, 300)


def main() -> None:
    model, tokenizer = embedded.load()
    tokenizer.padding_side = "left"
    facts = [magic_number(seed) for seed in range(len(LENGTHS))]
    chats = [
        [{"role": "user", "content": needle_prompt(tokenizer, length, 0.4, fact.needle, fact.question, seed)}]
        for seed, (length, fact) in enumerate(zip(LENGTHS, facts))
    ]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    questions = [fact.question for fact in facts]
    with flexasl.patch(model, flexasl.ASLConfig(select_tokens=256), tokenizer=tokenizer) as patch:
        out = model.generate(**inputs, question=questions, max_new_tokens=24, do_sample=False)
        report = patch.report
    answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for fact, answer, row in zip(facts, answers, report.rows):
        print(f"{row.prompt_tokens:,} tokens, {row.kept_tokens} kept, layer {row.selected_layer}; {row.reason}")
        print(f"  {fact.question}\n  {answer.strip()} ({fact.answer} is right)")


if __name__ == "__main__":
    main()
