"""Chat about a document that was read once: `python examples/saved_prompt.py`.

The document is read, pruned and saved. A chat then starts from the file, in any process, and reads only the questions.
"""

import tempfile
from pathlib import Path

import torch

import flexasl
from flexasl import embedded
from flexasl.tools.text import prose

FACTS = (
    "The lighthouse keeper at Cape Wrath was named Marguerite Dunmore.",
    "The bakery in Alder Street opens at five in the morning.",
)
QUESTIONS = ("Who was the lighthouse keeper at Cape Wrath?", "When does the bakery in Alder Street open?")
HINT = "What will I ask? Who the lighthouse keeper was, and when the bakery opens."
"""What ranks the document. Pruning keeps what is asked for, so it must know something of the questions."""


def ids_of(tokenizer, messages, **how):
    return tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, **how)["input_ids"]


def read(model, tokenizer, messages, path) -> None:
    """Reads the beginning of a chat, and saves what the model remembers of it."""
    config = flexasl.ASLConfig(select_tokens=512)
    with flexasl.patch(model, config, tokenizer=tokenizer, question=HINT) as patch, torch.no_grad():
        model(ids_of(tokenizer, messages), use_cache=True, logits_to_keep=1).past_key_values.save(path)
        print(patch.report)


def main() -> None:
    model, tokenizer = embedded.load()
    paragraphs = prose(1500, tokenizer, seed=3).split("\n\n")
    for place, fact in zip((3, 6), FACTS):
        paragraphs.insert(place, fact)
    text = "\n\n".join(paragraphs)
    messages = [
        {"role": "user", "content": f"{text}\n\n{HINT}"},
        {"role": "assistant", "content": "I have read it. What is your question?"},
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.safetensors"
        read(model, tokenizer, messages, path)
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB\n")
        with flexasl.patch(model):
            cache = flexasl.load_cache(path, model)
            for question in QUESTIONS:
                messages.append({"role": "user", "content": question})
                ids = ids_of(tokenizer, messages, add_generation_prompt=True)
                read_before = cache.get_seq_length()
                out = model.generate(ids, past_key_values=cache, max_new_tokens=32, do_sample=False)
                answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
                messages.append({"role": "assistant", "content": answer})
                print(f"{question} ({ids.shape[1] - read_before} new tokens read)\n  {answer}")


if __name__ == "__main__":
    main()
