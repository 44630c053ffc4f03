"""Ask the embedded model about a document: `python examples/ask_document.py [FILE QUESTION]`.

Prints the answer and what was pruned, and writes the page why.html, which shows the words that were kept.
"""

import sys
from pathlib import Path

import flexasl
from flexasl import embedded
from flexasl.tools.text import prose

FACT = "The lighthouse keeper at Cape Wrath was named Marguerite Dunmore."
QUESTION = "What was the name of the lighthouse keeper at Cape Wrath?"


def document(tokenizer) -> str:
    """Two thousand tokens of prose, with a fact in the middle."""
    paragraphs = prose(2000, tokenizer, seed=3).split("\n\n")
    paragraphs.insert(len(paragraphs) // 2, FACT)
    return "\n\n".join(paragraphs)


def main() -> None:
    model, tokenizer = embedded.load()
    if len(sys.argv) == 3:
        text, question = Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2]
    else:
        text, question = document(tokenizer), QUESTION
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{text}\n\n{question}"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with flexasl.patch(model, flexasl.ASLConfig(select_tokens=256), tokenizer=tokenizer) as patch:
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        report = patch.report
    answer = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"{answer}\n\n{report}")
    report.to_html(tokenizer, inputs.input_ids, "why.html", answer=answer)
    print("See why.html in a browser.")


if __name__ == "__main__":
    main()
