"""Which tokens of a prompt ask, found by its text."""

import copy
import enum
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_chat import tiny_tokenizer

from flexasl import FlexASLError
from flexasl.prompt_text import Span
from flexasl.question import asking, find_question, question_tokens, text_of

DOCUMENT = "The cat sat on the mat. It was a fine day, and Mr. Smith went home. Nobody knew the colour. " * 20
CHAT = (DOCUMENT + "Is there any hope? She shook her head and left the room.\n\n") * 2
RULES = (
    "Answer in one short sentence. Do not add any explanation. Write plain text without markdown. Do not repeat the "
    "text above. If you are not sure, say so. Keep a polite and neutral tone. Write numbers as digits. Never invent "
    "facts that the text does not state."
)
Q = "What is the special magic number for the red fox?"
REFERENCE = (
    "Return True if all characters in the string are digits, False otherwise.\n\nReturn a copy of the string.\n\n" * 9
)
PROGRAM = (
    "def first(items, test):\n    for item in items:\n        if test(item):\n            return item\n"
    "        continue\n    return items, test\n"
)

TEXTS = {
    "at the end": (f"Some numbers are hidden below.\n\n{DOCUMENT}\n\n{Q}", [Q]),
    "with rules behind it": (f"{DOCUMENT}\n\n{Q} {RULES}", [Q]),
    "with rules in lines": (f"{DOCUMENT}\n\n{Q}\n\n- JSON only\n- no prose\n- at most 10 words\n", [Q]),
    "rules between and behind": (f"{DOCUMENT}\n\n{RULES}\n\n{Q}\n\n{RULES}", [Q]),
    "with other text behind it": (f"{DOCUMENT}\n\n{Q} The report goes to the board on Monday. Thank you!", [Q]),
    "before the document": (f"{Q}\n\n{DOCUMENT}", [Q]),
    "before, rules behind": (f"{Q}\n\n{DOCUMENT}\n\n{RULES}", [Q]),
    "before a document that asks": (f"{Q}\n\n{CHAT}", [Q]),
    "before, after a word of greeting": (f"Hello! I have a long text for you. {Q}\n\n{DOCUMENT}", [Q]),
    "both": (f"{Q}\n\n{DOCUMENT}\n\nQuestion: {Q}\nAnswer:", [Q, f"Question: {Q}"]),
    "in one line": (f"{DOCUMENT}{Q} {RULES}", [Q]),
    "none in code": (
        "import os\n\n\ndef first(items, test):\n    # return the first of them that passes, list others\n"
        "    for item in items:\n        if test(item):\n            return item\n    print(items)\n"
        '    return (\'\', False, None)\n\n\ndef all(self):\n    """Return the entire message."""\n'
        "    quotes = {}\n    selected = find_all(items)\n    return self.as_bytes()\n",
        [],
    ),
    "behind code": ("def first(items):\n    return items[0]\n\nfind what it returns for an empty list", None),
    "and a task in a line, in a text that opens like a task": (
        f"Return the keys of the dictionary. {DOCUMENT}\n\nWhose mat is it? Give the name of the person.\n\n"
        f"Rely on the text above and on nothing else. {RULES}",
        ["Whose mat is it?", "Give the name of the person."],
    ),
    "before a reference": (f"{Q}\n\n{REFERENCE}", [Q]),
    "before a reference, rules behind": (f"{Q}\n\n{REFERENCE}{RULES}", [Q]),
    "behind a reference": (f"{REFERENCE}{Q}", [Q]),
    "behind a reference, with a task": (
        f"{REFERENCE}{Q}\n\nExplain how it was found.",
        [Q, "Explain how it was found."],
    ),
    "a task behind a reference": (f"{REFERENCE}Explain what is returned.", ["Explain what is returned."]),
    "before a program": (f"{Q}\n\n{PROGRAM}", [Q]),
    "behind a program": (f"{PROGRAM}\n{Q}", [Q]),
    "behind a pattern": (f"{PROGRAM}\n    for found in (r'(?P<quote>[\"']).*?', # \"?\n{Q}", [Q]),
    "before a pattern": (f"{Q}\n\n{PROGRAM}\n    found = re.compile(r'(?P<quote>[\"']).*?')", [Q]),
    "about a pattern": (f"{PROGRAM}\n\nWhat does r'(?P<quote>a).*?' find?", ["What does r'(?P<quote>a).*?' find?"]),
    "a task before a manual": (
        f"Explain the second step.\n\n{DOCUMENT}\n\nCreate a mask. It is of zeros.",
        ["Explain the second step."],
    ),
    "before a text that states when": (f"{Q}\n\n{DOCUMENT}\n\nWhen it is over, the cat is fed.", [Q]),
    "before a list of changes": (f"{Q}\n\n{DOCUMENT}\n\n* Fix a bug of the mat.", [Q]),
    "a greeting that asks, a task behind": (
        f"Can you help me?\n\n{DOCUMENT}\n\nSummarise the text.",
        ["Summarise the text."],
    ),
    "over two lines": (f"{DOCUMENT}\n\nBased on the text, which animal sat on\nthe mat?", None),
    "of a doctor": (f"{DOCUMENT}\n\nWhen did Dr. Smith go home? {RULES}", ["When did Dr. Smith go home?"]),
    "in quotes": (f'{DOCUMENT}\n\nWho said "Is it so?" to Mr. Smith?', ['Who said "Is it so?" to Mr. Smith?']),
    "two": (f"{DOCUMENT}\n\nWho signed? When? Answer briefly.", ["Who signed?", "When?"]),
    "a list": (
        f"{DOCUMENT}\n\n1. Who signed?\n2. When does it end?\n\n{RULES}",
        ["1. Who signed?", "2. When does it end?"],
    ),
    "in lines": (f"{DOCUMENT}\n\nWho signed?\nWhen does it end?", ["Who signed?", "When does it end?"]),
    "without a mark": (f"{DOCUMENT}\nwhat is the colour of the mat", ["what is the colour of the mat"]),
    "a task": (f"{DOCUMENT}\n\nSummarise the text above. {RULES}", ["Summarise the text above."]),
    "a task before": (f"Summarize the following text:\n\n{DOCUMENT}", ["Summarize the following text:"]),
    "a polite task": (f"{DOCUMENT}\n\nPlease list all people who left.\n{RULES}", ["Please list all people who left."]),
    "a task after a document that asks": (f"{CHAT}List everybody who left.", ["List everybody who left."]),
    "a task with a format": (f"{DOCUMENT}\n\nGive all values, separated by commas, and nothing else.", None),
    "a question and a list of formats": (f"{DOCUMENT}\n\n{Q} Give the number alone.", [Q]),
    "a wish": (f"{DOCUMENT}\n\nI would like to know where he went.", ["I would like to know where he went."]),
    "a label": (f"{RULES}\n\n{DOCUMENT}\n\nQuestion: who was fine\nHelpful Answer:", ["Question: who was fine"]),
    "a heading": (
        f"{DOCUMENT}\n\n## Question\n\nthe colour of the mat\n\n## Format\n\nJSON only",
        ["the colour of the mat"],
    ),
    "of choices": (f"{DOCUMENT}\n\n{Q}\n\nA. 12\nB. 14\n\nGive the letter of the only right option.", [Q]),
    "at the end, a task before": (f"Find a key below.\n\n{DOCUMENT}\n\n{Q} The answer is a number.", [Q]),
    "in Chinese": (f"请阅读。\n\n{DOCUMENT}\n\n问题：他是谁？", ["问题：他是谁？"]),
    "in Spanish": (f"{DOCUMENT}\n\n¿Quién se fue a casa?", ["¿Quién se fue a casa?"]),
    "alone": (Q, [Q]),
    "none": (DOCUMENT, []),
    "rules alone": (RULES, []),
    "nothing": ("", []),
}


@pytest.mark.parametrize("name", TEXTS)
def test_sentences_that_ask(name):
    turn, want = TEXTS[name]
    if want is None:  # the last paragraph
        want = [turn.split("\n\n")[-1]]
    assert sentences(turn) == want


def test_questions_around_programs():
    """Of Python's library: what opens like a task or a question there is taken for one in few modules."""
    modules = sorted(Path(enum.__file__).parent.glob("*.py"))
    texts = [text for text in (path.read_text("utf-8", "ignore") for path in modules) if len(text) > 12_000]
    texts = [text[start : text.index("\n", start + 7000)] for text in texts for start in [text.index("\n", 3000)]]
    assert len(texts) > 50
    for rules in ("", f"\n\n{RULES}"):
        behind = [sentences(f"{text}\n\n{Q}{rules}") for text in texts]
        assert all(Q in asked for asked in behind)
        assert sum(asked == [Q] for asked in behind) >= 0.95 * len(texts)
        before = [sentences(f"{Q}\n\n{text}{rules}") for text in texts]
        assert sum(Q in asked for asked in before) >= 0.95 * len(texts)


def sentences(turn):
    return [turn[start:stop] for start, stop in asking(turn)]


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nWhat do you need?<|im_end|>\n{% endif %}"
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "chatml with a system turn": (SYSTEM + CHATML, ["<|im_start|>", "<|im_end|>"]),
    "gemma": (
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    ),
    "llama 3": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
        "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
        " {{ m.content }}</s>{% endif %}{% endfor %}",
        ["<s>", "</s>"],
    ),
    "without special tokens": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        [],
    ),
    "none": (None, []),
    "one that fails": ("{{ raise_exception('no') }}", []),
}


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request):
    template, special = TEMPLATES[request.param]
    made = copy.deepcopy(tiny_tokenizer(chat=False))
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = template
    return made


def rendered(tokenizer, *turns):
    """A conversation, the user first, up to the answer."""
    if tokenizer.chat_template is None or "raise" in tokenizer.chat_template:
        return "\n\n".join([*turns, "Answer:"])
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def found(tokenizer, ids):
    spans = find_question(tokenizer, ids)
    assert all(0 <= span.start < span.stop <= len(ids) for span in spans)
    return text_of(tokenizer, ids, spans)


@pytest.mark.parametrize("prefix", ["", " The number is"])
def test_the_users_last_turn(tokenizer, prefix):
    text = f"{DOCUMENT}\n\n{Q} {RULES}"
    assert found(tokenizer, ids_of(tokenizer, rendered(tokenizer, text) + prefix)) == Q
    talk = rendered(tokenizer, "Who are you? Tell me.", "What do you need?", text)
    assert found(tokenizer, ids_of(tokenizer, talk)) == Q


def test_a_later_turn_by_itself(tokenizer):
    whole = rendered(tokenizer, "Hello.", "Ok.", Q)
    assert found(tokenizer, ids_of(tokenizer, whole[whole.index("Ok.") + 3 :])) == Q


def test_a_system_turn_does_not_ask(tokenizer):
    ids = ids_of(tokenizer, rendered(tokenizer, DOCUMENT))
    assert find_question(tokenizer, ids) == ()


class Slow:
    """A tokenizer that tells no offsets."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def decode(self, ids):
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


BEFORE, ASKED, AFTER = "Der Käse ist größer. 🙂 ", "Was “kostet” der Käse — 🙂?", " Kurz, bitte 🙂."


def test_tokens_that_overlap_a_text(tokenizer):
    ids = ids_of(tokenizer, ASKED + BEFORE + ASKED + AFTER)
    start, stop = question_tokens(tokenizer, ids, f" {ASKED}\n")
    held = tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
    assert ASKED in held and start > 10
    for span in (Span(start + 1, stop), Span(start, stop - 1)):
        assert ASKED not in tokenizer.decode(ids[slice(*span)], clean_up_tokenization_spaces=False)
    assert question_tokens(Slow(tokenizer), ids, ASKED) == (start, stop)


@settings(max_examples=50)
@given(before=st.text(max_size=20), after=st.text(max_size=20), asked=st.text(min_size=1, max_size=20))
def test_both_ways_to_find_tokens_agree(before, after, asked):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(before + asked + after, add_special_tokens=False).input_ids
    if not asked.strip() or asked.strip() not in tokenizer.decode(ids, clean_up_tokenization_spaces=False):
        return
    start, stop = question_tokens(tokenizer, ids, asked)
    assert asked.strip() in tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
    slow = question_tokens(Slow(tokenizer), ids, asked)
    assert asked.strip() in tokenizer.decode(ids[slow.start : slow.stop], clean_up_tokenization_spaces=False)
    assert start <= slow.start and slow.stop <= stop


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Who?", "question='Who\\?' is not in the prompt; give it as it stands there, or as positions"),
        (" ", "question=' ' has no text; give the question as it is written in the prompt"),
        (3, "question=3 has no text"),
    ],
)
def test_a_text_that_is_not_there(text, message):
    tokenizer = tiny_tokenizer()
    with pytest.raises(FlexASLError, match=message):
        question_tokens(tokenizer, ids_of(tokenizer, DOCUMENT), text)


@settings(max_examples=100)
@given(st.text(st.sampled_from(" \n\t.?!:;\"'*#-1A)what isfindQ：？。"), max_size=200))
def test_any_text_gives_parts_of_it_in_order(text):
    ends = [0, *(end for part in asking(text) for end in part)]
    assert ends == sorted(ends) and ends[-1] <= len(text)
    assert all(text[start:stop].strip() == text[start:stop] != "" for start, stop in asking(text))
