"""Prompts of the evaluation: how long they are, what they hide, and that what is asked for is what was hidden."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_chat import tiny_tokenizer

from flexasl.errors import FlexASLError
from flexasl.question import find_question, text_of
from flexasl.tools.evaluation import Sample, Sources, build, tasks
from flexasl.tools.evaluation.haystack import Haystack, hide
from flexasl.tools.evaluation.recall import PARAPHRASES
from flexasl.tools.evaluation.samples import AFTER_QUESTION, RULES, Draft, Recipe, Wording, fill
from flexasl.tools.text import encode, prompt_ids, render

RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
GENERATED = [name for name, task in tasks().items() if task.needs is None]
ONE_NEEDLE = ("needle", "niah_single_1", "niah_single_2", "niah_single_3", "passkey", "number_string", "kv_retrieval")
UNIT_TOKENS = 160
"""More tokens than any unit of a task has: a pair of identifiers, a sentence."""


def body(sample: Sample) -> str:
    """The user's message."""
    return sample.prompt.removeprefix("<user>").partition("<end><assistant>")[0]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("data")
    squad = folder / "squad.json"
    articles = [
        {
            "title": f"Article {number}",
            "paragraphs": [
                {
                    "context": f"Paragraph {number}.{part}: the colour of item {number}{part} is hue{number}{part}.",
                    "qas": [
                        {
                            "question": f"What is the colour of item {number}{part}?",
                            "answers": [{"text": f"hue{number}{part}", "answer_start": 0}],
                        },
                        {"question": "Who knows?", "answers": [], "is_impossible": True},
                    ],
                }
                for part in range(3)
            ],
        }
        for number in range(4)
    ]
    squad.write_text(json.dumps({"version": "1.1", "data": articles}))
    hotpot = folder / "hotpot.json"
    records = [
        {
            "question": f"Where is the owner of thing {number} from?",
            "answer": f"Town{number}",
            "supporting_facts": [[f"Thing {number}", 0], [f"Owner {number}", 0]],
            "context": [
                [f"Thing {number}", [f"Thing {number} belongs to Owner {number}."]],
                [f"Owner {number}", [f"Owner {number} is from Town{number}.", " That is all."]],
                [f"Other {number}", [f"Nothing is known of {number}."]],
            ],
        }
        for number in range(5)
    ]
    hotpot.write_text(json.dumps(records))
    book = " ".join(f"word{number}" for number in range(3000))
    lines: dict[str, list[dict]] = {
        "longbook_qa_eng": [{"context": book, "input": f"Who is {n}?", "answer": [f"She{n}", "Her"]} for n in range(3)],
        "longbook_choice_eng": [
            {"context": book, "input": "Which?", "answer": ["blue"], "options": ["red", "blue", "green", "grey"]}
        ],
        "math_calc": [{"context": "1 + 2 - 4", "input": "", "answer": [3, -1]}],
        "code_debug": [{"context": book, "input": "", "answer": ["g"], "options": ["f", "h", "k", "m"]}],
    }
    for name, content in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    return Sources(qa_files=(squad, hotpot), infinitebench=folder)


def test_every_task_is_there() -> None:
    assert tuple(tasks("ruler")) == RULER
    assert len(tasks("infinitebench")) == 12
    assert {"passkey", "number_string", "kv_retrieval"} <= set(tasks("infinitebench"))
    assert set(tasks("niah")) == {"needle"}
    assert {name for name, task in tasks("ruler").items() if task.needs} == {"qa_1", "qa_2"}
    tokens = {name: task.max_new_tokens for name, task in tasks().items()}
    assert {tokens[name] for name in RULER if name.startswith("niah")} == {128}
    assert [tokens[name] for name in ("vt", "cwe", "fwe", "qa_1", "passkey", "number_string")] == [
        30,
        120,
        50,
        32,
        6,
        12,
    ]
    with pytest.raises(FlexASLError, match="suite='rulers' is not known; give one of ruler, "):
        tasks("rulers")


@given(task=st.sampled_from(GENERATED), length=st.integers(1200, 3000), seed=st.integers(0, 99), chat=st.booleans())
@settings(max_examples=20)
def test_prompt_fills_its_length(task: str, length: int, seed: int, chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat=chat)
    sample = build(task, tokenizer, length, seed, index=3)
    assert len(encode(tokenizer, sample.prompt)) == sample.prompt_tokens
    assert length - UNIT_TOKENS < sample.prompt_tokens <= length
    assert sample == build(task, tokenizer, length, seed, index=3)
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
    assert sample.references and all(reference in sample.prompt for reference in sample.references)
    assert tasks()[task].score("I do not know", sample.references) == 0
    assert tasks()[task].score(", ".join(sample.references), sample.references) == 1


@pytest.mark.parametrize("task", GENERATED)
def test_samples_differ(tokenizer, task: str) -> None:
    length = 1100 if task == "cwe" else 500

    def prompt(**which: int) -> str:
        return build(task, tokenizer, length, **which).prompt

    assert len({prompt(), prompt(seed=1), prompt(index=1), prompt(seed=1, index=1)}) == 4


@pytest.mark.parametrize("task", ONE_NEEDLE)
def test_one_needle_lies_at_its_depth(tokenizer, task: str) -> None:
    for index in range(4):
        sample = build(task, tokenizer, 2000, index=index)
        text = body(sample)
        place = text.index(sample.references[0])
        assert place / len(text) == pytest.approx(sample.depth, abs=0.1)


def test_needle_goes_through_the_depths(tokenizer) -> None:
    sources = Sources(depths=(0.0, 0.5, 1.0))
    depths = [build("needle", tokenizer, 600, index=index, sources=sources).depth for index in range(4)]
    assert depths == [0.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    "task", ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery"]
)
def test_needles_are_what_the_benchmark_hides(tokenizer, task: str) -> None:
    sample = build(task, tokenizer, 1500)
    needles = re.findall(r"One special magic number for ([a-z-]+) is (\d{7})\.", body(sample))
    keys = Counter(key for key, _ in needles)
    hidden, asked = {"multikey_1": (4, 1), "multivalue": (1, 1), "multiquery": (4, 4)}.get(task[5:], (1, 1))
    assert len(keys) == hidden and set(keys.values()) == {4 if task == "niah_multivalue" else 1}
    question = body(sample).rpartition("\n\n")[2]
    named = [key for key in keys if key in question]
    assert len(named) == asked
    assert sorted(sample.references) == sorted(value for key, value in needles if key in named)
    assert all(key in sample.prompt.partition("<assistant>")[2] for key in named), "the answer's start names the keys"


@pytest.mark.parametrize(("task", "key"), [("niah_multikey_2", r"[a-z-]+"), ("niah_multikey_3", r"[0-9a-f-]{36}")])
def test_haystack_of_needles(tokenizer, task: str, key: str) -> None:
    sample = build(task, tokenizer, 3000)
    document = body(sample).partition("\n\n")[2].rpartition("\n\n")[0]
    sentences = [sentence for sentence in document.split(".") if sentence.strip()]
    found = [re.fullmatch(rf"\s*One special magic \w+ for ({key}) is ([0-9a-f-]+)", one) for one in sentences]
    assert len(found) > 20 and all(found)
    pairs = dict(one.groups() for one in found)
    assert len(pairs) == len(found), "keys differ"
    (asked,) = (name for name in pairs if name in body(sample).rpartition("\n\n")[2])
    assert sample.references == (pairs[asked],)


def test_variables_follow_from_one_another(tokenizer) -> None:
    sample = build("vt", tokenizer, 2000)
    asked = re.search(r"value (\d{5}) by", body(sample).rpartition("Question:")[2])[1]
    value: dict[str, str] = {}
    for name, given_ in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", body(sample)):
        value[name] = value.get(given_, given_)
    assert {name for name, held in value.items() if held == asked} == set(sample.references)
    assert len(sample.references) == 5 and len(value) == 10, "with one solved example"


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 6, 1), (6000, 30, 3)])
def test_common_words(tokenizer, length: int, often: int, seldom: int) -> None:
    sample = build("cwe", tokenizer, length)
    _, example, asked = body(sample).split("Some words occur more often than others")
    entries = re.findall(r"(\d+)\. ([a-z]+)", asked)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert {word for word, count in counts.items() if count == often} == set(sample.references)
    assert set(counts.values()) == {often, seldom} and len(sample.references) == 10
    assert not set(counts) & set(re.findall(r"\d+\. ([a-z]+)", example))


def test_frequent_words(tokenizer) -> None:
    sample = build("fwe", tokenizer, 3000)
    words = body(sample).splitlines()[1].split()
    (dots, most), *rest = Counter(words).most_common()
    assert dots == "..." and tuple(word for word, _ in rest[:3]) == sample.references
    assert all(len(word) == 6 for word, _ in rest)
    for rank, (_, count) in enumerate(rest[:6], 2):
        assert count == pytest.approx(most / rank**2, abs=1.5)
    assert rest[2][1] > rest[3][1], "the third is no tie"


def test_numbers_in_runs(tokenizer) -> None:
    digits = [build("number_string", tokenizer, 400, index=index).references[0] for index in range(10)]
    assert all(re.fullmatch(r"[1-9]\d{9}", one) for one in digits)
    assert sum(one == two for text in digits for one, two in itertools.pairwise(text)) > 30


def test_key_value_is_json(tokenizer) -> None:
    sample = build("kv_retrieval", tokenizer, 2000)
    data = json.loads(re.search(r"\{.*\}", body(sample))[0])
    asked = re.search(r'key "([^"]+)"\?', body(sample))[1]
    assert sample.references == (data[asked],) and len(data) > 5


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_question_answering(tokenizer, sources: Sources, task: str) -> None:
    seen = set()
    for index in range(5):
        short, long = (build(task, tokenizer, length, index=index, sources=sources) for length in (250, 900))
        assert 700 < long.prompt_tokens <= 900
        seen.add(long.references)
        for sample in (short, long):
            assert sample.references[0] in body(sample)
            numbers = re.findall(r"Document (\d+):", body(sample))
            assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
        assert short.prompt.count("Document ") < long.prompt.count("Document ")
        if task == "qa_2":
            number = short.references[0].removeprefix("Town")
            assert f"Thing {number} belongs" in body(short), "both needed documents are there"
    assert len(seen) == 5, "each question once"


def test_questions_run_out(tokenizer, sources: Sources) -> None:
    with pytest.raises(FlexASLError, match="samples=6 is more than the file of task 'qa_2' holds; give at most 5"):
        build("qa_2", tokenizer, 500, index=5, sources=sources)


@pytest.mark.parametrize("task", ["qa_1", "longbook_sum_eng"])
def test_absent_file(tokenizer, task: str) -> None:
    option = "--qa-file" if task == "qa_1" else "--infinitebench"
    with pytest.raises(FlexASLError, match=rf"task='{task}' needs .*{option}$"):
        build(task, tokenizer, 500)


def test_book_is_cut_in_the_middle(tokenizer, sources: Sources) -> None:
    sample = build("longbook_qa_eng", tokenizer, 700, sources=sources)
    assert 690 < sample.prompt_tokens <= 700
    book = body(sample).split("\n\n")[1]
    assert book.startswith("word0 word1 ") and book.endswith(" word2999")
    assert "word1500" not in book
    assert re.fullmatch(r"She\d", sample.references[0]) and sample.references[1] == "Her"
    whole = build("math_calc", tokenizer, 700, sources=sources)
    assert "\n\n1 + 2 - 4\n\n" in whole.prompt and whole.references == ("3", "-1")


def test_options_have_letters(tokenizer, sources: Sources) -> None:
    sample = build("longbook_choice_eng", tokenizer, 700, sources=sources)
    assert sample.references == ("blue", "B") and "\nB. blue\n" in sample.prompt
    with pytest.raises(FlexASLError, match="the answer 'g' is none of the options"):
        build("code_debug", tokenizer, 700, sources=sources)


def test_haystack_of_the_user(tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "hay.txt"
    file.write_text("The tide turns. Boats wait in the bay!\n\nNobody knows why.\n" + "long " * 500)
    sample = build("niah_single_2", tokenizer, 900, sources=Sources(haystack=file))
    assert "Boats wait in the bay!" in sample.prompt and "Python" not in sample.prompt


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"haystack": Path("none.txt")}, "none.txt does not exist"),
        ({"depths": (0.5, 2.0)}, r"depths=\[0.5, 2.0\] are not shares"),
        ({"infinitebench": Path("none")}, "infinitebench=none is not a folder"),
    ],
)
def test_bad_sources(arguments: dict, words: str) -> None:
    with pytest.raises((FlexASLError, FileNotFoundError), match=words):
        Sources(**arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("{}", "is neither SQuAD's nor HotpotQA's: data is missing; give one of them"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\].paragraphs\[0\].context is missing"),
        ('{"data": []}', "has no question with an answer"),
        ('[{"question": "Why?"}]', r"\[0\].answer is missing"),
    ],
)
def test_bad_question_file(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "qa.json"
    file.write_text(content)
    with pytest.raises(FlexASLError, match=words):
        Sources(qa_files=(file,))


def test_bad_benchmark_file(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "code_run.jsonl").write_text('{"context": "a", "input": "b", "answer": [1]}\n{"context": "a"}\n')
    with pytest.raises(FlexASLError, match=r"code_run.jsonl, line 2: input is missing; give InfiniteBench's file"):
        build("code_run", tokenizer, 500, sources=Sources(infinitebench=tmp_path))


def test_too_short_a_length_says_how_long(tokenizer) -> None:
    with pytest.raises(FlexASLError, match=r"task='passkey': length=20 is too short; give at least (\d+)") as caught:
        build("passkey", tokenizer, 20)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert build("passkey", tokenizer, least).prompt_tokens == least


@given(tokens=st.integers(5, 60), most=st.none() | st.integers(0, 30), least=st.integers(0, 3))
def test_fill_finds_the_longest(tokens: int, most: int | None, least: int) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    made: list[int] = []

    def draft(units: int) -> Draft:
        made.append(units)
        return Draft("x" + " 7" * units, "", ("x",))

    most = None if most is None else max(most, least)
    found, _, count = fill(Recipe(draft, least=least, most=most), tokenizer, max(tokens, 20))
    units = found.message.count("7")
    assert count == len(tokenizer(found.message)["input_ids"]) <= max(tokens, 20)
    longer = len(tokenizer("x" + " 7" * (units + 1))["input_ids"])
    assert units == most or longer > max(tokens, 20)
    assert all(least <= number and (most is None or number <= most) for number in made)


@pytest.mark.parametrize("chat", [True, False])
def test_rendered_prompt_reads_as_elsewhere(chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat=chat)
    assert encode(tokenizer, render(tokenizer, "Hello.", "It is")) == prompt_ids(tokenizer, "Hello.", "It is")
    assert encode(tokenizer, render(tokenizer, "Hello.", "")) == prompt_ids(tokenizer, "Hello.")


def test_needles_keep_their_order() -> None:
    assert hide(["1", "2", "3"], [0.5, 0.5, 0.0], ["aa", "bb"]) == "3 aa 1 2 bb"
    assert hide(["1"], [1.0], ["aa.", "bb.\n\n", "cc.\n\n"]) == "aa. bb.\n\ncc.\n\n1"
    assert hide(["1"], [0.7], []) == "1"


def test_sentences_of_a_text() -> None:
    text = "One. Two, e.g. this! Three?\n\nFour\n\n" + "y" * 900
    first = Haystack(text).read_from(Random(1)).first(7)
    assert sorted(set(first)) == sorted(
        ["One.", "Two, e.g. this!", "Three?\n\n", "Four\n\n", "y" * 400, "y" * 100 + "\n\n"]
    )


@pytest.mark.parametrize("one", PARAPHRASES)
def test_question_by_meaning_shares_no_word_with_its_statement(one) -> None:
    def words(text: str) -> set[str]:
        return {word for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 3}

    assert not words(one.statement) & words(one.question)


def test_each_sentence_of_a_uniform_text_has_another_key(tokenizer) -> None:
    sample = build("uniform", tokenizer, 2000)
    keys = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+(?= paid \d+ crowns)", body(sample))
    assert len(keys) > 10 and len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["needle", "niah_multivalue", "vt", "fwe", "kv_retrieval", "by_meaning", "uniform"])
def test_question_stands_where_it_is_asked_to(tokenizer, name) -> None:
    usual, first = (build(name, tokenizer, 1200, wording=Wording(question_first=one)) for one in (False, True))
    question = body(usual).rpartition("\n")[2]
    assert question.rstrip().endswith(("?", ".")) and body(first).startswith(f"{question}\n\n")
    assert body(first).count(question) == body(usual).count(question) and first.references == usual.references
    assert not body(first).endswith(question)


@pytest.mark.parametrize("after", AFTER_QUESTION)
def test_question_is_found_whatever_stands_behind_it(tokenizer, after) -> None:
    for name, task in tasks().items():
        for seed in range(3) if task.needs is None else ():
            plain, made = (
                build(name, tokenizer, 3000, seed, wording=Wording(after_question=one, answer_prefix=False))
                for one in (None, after)
            )
            ids = encode(tokenizer, made.prompt)
            found = text_of(tokenizer, ids, find_question(tokenizer, ids)).replace(" … ", " ")
            assert " ".join(body(plain).rpartition("\n")[2].split()) in found, (name, seed, found)


def test_end_of_prompts_is_chosen(tokenizer) -> None:
    plain, short, ruled, long, bare = (
        build("needle", tokenizer, 900, wording=one)
        for one in (
            *(Wording(after_question=key) for key in (None, "rules-30", "rules", "rules-120")),
            Wording(answer_prefix=False),
        )
    )
    for made, rules in ((short, RULES[:1]), (ruled, RULES[:2]), (long, RULES)):
        assert body(made).endswith(" ".join(rules)) and made.prompt_tokens <= 900
    assert RULES[0] not in plain.prompt and RULES[1] not in short.prompt and RULES[2] not in ruled.prompt
    assert bare.prompt.endswith("<assistant>") and not plain.prompt.endswith("<assistant>")
