"""Nonsense on the command line: one sentence and status 2, before a model is loaded, and nothing is written."""

import json
import random
from pathlib import Path

import pytest
import transformers

from flexasl import cli, embedded

pytestmark = pytest.mark.cpu("starts commands, which choose a device themselves")

LINES = 3000
LONG = "9" * 400
WORDS = ("", "many", "nan", "-1", "1.5.1", "ä", "--", "[]", "None")
COUNTS = ("", "0", "-1", "1.5", "nan", "inf", "1e3", "many", "0x10", LONG, "9" * 5000)
AMOUNTS = ("", " ", "0", "-1", "16", "1.5", "-0.5", "nan", "inf", "-inf", "1e400", "many", "k", "1kk", "0x10", LONG)
SHARES = ("", "nan", "-0.1", "1.01", "inf", "half", LONG)
INTEGERS = ("", "nan", "1.5", "many", "9" * 5000)
TO_READ = (
    "",
    ".",
    "folder",
    "none.txt",
    "none/x.txt",
    "text.txt/x",
    "binary",
    "latin",
    "blank",
    "/dev/null",
    "x" * 300,
)
JSON = (*TO_READ, "text.txt", "list.json", "other.json", "wrong.json", "deep.json", "cut.json", "twice.json")
TO_WRITE = ("", ".", "folder", "none/x", "text.txt/x", "/proc/x", "/dev/null", "x" * 300)
MODELS = (
    "",
    ".",
    "folder",
    "text.txt",
    "binary",
    "none.gguf",
    "./none",
    "/none",
    "~/none",
    "a/b/c",
    "a b",
    "ä/ö",
    "-x",
)
DEVICES = ("", "abacus", "meta", "cpu:x", "cpu:-1", "cuda:99", "-1", "nan", "hpu", "0.5")
NAMES = ("", ",", "none", "needle,", "-1", "nan", "needle,,passkey", "NEEDLE", "ä")
LENGTHS = ("", ",", "0", "-1", "1.5", "nan", "k", "1k,", "many", LONG, "0k")

PICTURES = (*TO_WRITE, "x.doc", "folder.png", "none/x.png", "/proc/x.png", "x" * 300 + ".png", ".png")
TO_ASK = ("", " ", "\n", "\udcff", "Wh\udcffy?")

LOADED = {
    "--model": MODELS,
    "--dtype": (*WORDS, "int7", "FLOAT32", "float64"),
    "--device": DEVICES,
}
OF_A_TEXT = LOADED | {
    "--file": TO_READ,
    "--select-tokens": AMOUNTS,
    "--kv-budget": AMOUNTS,
    "--kv-dtype": (*WORDS, "int4", "float32"),
    "--tau": (*SHARES, "0"),
    "--config": JSON,
    "--policy": (*WORDS, "best", "ASL"),
}
NONSENSE: dict[str, dict[str, tuple[str, ...]]] = {
    "ask": OF_A_TEXT
    | {
        "--question": TO_ASK,
        "--cache": (*TO_READ, "text.txt", "list.json"),
        "--max-new-tokens": COUNTS,
        "--plot": PICTURES,
        "--html": (*TO_WRITE, "x.png", "none/x.html", "/proc/x.html", "x" * 300 + ".html", ".html"),
    },
    "prefill": OF_A_TEXT | {"--out": TO_WRITE, "--about": TO_ASK, "--question": TO_ASK, "--plot": PICTURES},
    "inspect": {"": (*TO_READ, "text.txt", "list.json")},
    "demo": LOADED
    | {
        "--tokens": (*COUNTS, "255"),
        "--depth": SHARES,
        "--seed": INTEGERS,
        "--select-tokens": AMOUNTS,
        "--policy": (*WORDS, "best"),
    },
    "eval": LOADED
    | {
        "--suite": (*WORDS, "slow"),
        "--tasks": (*NAMES, "qa_1", "longbook_sum_eng"),
        "--policies": ("", ",", "best", "asl:tau", "asl:tau=", "asl:depth=1", "full:tau=1", "asl:tau=2", "asl,"),
        "--budget": ("", ",", "0", "-1", "16", "1.5", "nan", "inf", "many", "256,", "true", "none"),
        "--lengths": LENGTHS,
        "--samples": COUNTS,
        "--config": JSON,
        "--out": ("", "text.txt", "text.txt/x", "/proc/x", "/dev/null", "x" * 300),
        "--seed": INTEGERS,
        "--haystack": TO_READ,
        "--depths": ("", ",", "2", "-0.1", "nan", "inf", "half", "0,", LONG),
        "--qa-file": (*JSON, "none"),
        "--infinitebench": ("", "text.txt", "none", "/dev/null", "x" * 300),
        "--answer-tokens": COUNTS,
        "--rank-by": (*WORDS, "both", "policy,window", "Window"),
        "--after-question": (*WORDS, "text", "rules,rules"),
    },
    "calibrate": LOADED
    | {
        "--out": (*TO_WRITE, "x.txt", "folder.json", "none/x.json", "/proc/x.json", "x" * 300 + ".json", ".json"),
        "--select-tokens": (*AMOUNTS, "1.0"),
        "--length": (*LENGTHS, "1k,2k"),
        "--tasks": (*NAMES, "qa_1", "longbook_sum_eng"),
        "--unseen": ("", "best", "needle", "qa_2", "math_find", "-1"),
        "--samples": COUNTS,
        "--seed": INTEGERS,
        "--haystack": TO_READ,
    },
}
GOOD: dict[str, dict[str, str]] = {
    "ask": {"--question": "Why?", "--file": "text.txt"},
    "prefill": {"--out": "new.safetensors", "--file": "text.txt"},
    "inspect": {},
    "demo": {},
    "eval": {"--out": "new"},
    "calibrate": {"--out": "new.json"},
}
ALSO_GOOD: dict[str, dict[str, str]] = {
    "ask": {"--select-tokens": "0.25", "--tau": "0.3", "--plot": "new.png", "--policy": "snapkv", "--dtype": "float16"},
    "prefill": {"--tau": "0.3", "--kv-budget": "4k", "--config": "right.json"},
    "inspect": {},
    "demo": {"--tokens": "700", "--depth": "0", "--seed": "-3"},
    "eval": {"--suite": "niah", "--policies": "asl:tau=0.3,paper", "--lengths": "1k", "--rank-by": "window"},
    "calibrate": {"--select-tokens": "100", "--length": "2k", "--unseen": "none", "--haystack": "text.txt"},
}


class ModelReached(BaseException):
    """Nonsense has come as far as a model."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of many kinds, and no saved prompt."""
    place = tmp_path_factory.mktemp("place")
    for folder in ("folder", "folder.png", "folder.json"):
        (place / folder).mkdir()
    files = {
        "binary": b"\0\1",
        "latin": b"\xff\xfe",
        "blank": b" \n",
        "text.txt": b"A text. " * 200,
        "list.json": b"[]",
    }
    files |= {"cut.json": b'{"tau": ', "deep.json": b"[" * 100_000, "twice.json": b'{"tau": 0.2, "tua": 1, "tau": 0.3}'}
    settings = {"other.json": {"data": [], "x": 1}, "wrong.json": {"tau": 7}, "right.json": {"tau": 0.5}}
    files |= {name: json.dumps(setting).encode() for name, setting in settings.items()}
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """That a command line is refused as it should be; and what was said."""

    def reached(*_: object, **__: object) -> None:
        raise ModelReached

    monkeypatch.chdir(place)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", reached)
    monkeypatch.setattr(embedded, "load", reached)
    before = sorted(place.rglob("*"))

    def check(*arguments: str) -> str:
        try:
            with pytest.raises(SystemExit) as caught:
                cli.main(list(arguments))
        except ModelReached:
            pytest.fail(f"a model would have been loaded: {arguments}")
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, ""), (arguments, out, err)
        assert err.startswith("flexasl: ") and err.count("\n") == 1, (arguments, err)
        assert "Traceback" not in err and "Errno" not in err and "unexpected" not in err, (arguments, err)
        assert len(err) > len("flexasl: ") + 8, (arguments, err)
        assert sorted(place.rglob("*")) == before, arguments
        return err

    return check


def _typed(command: str, options: dict[str, str]) -> list[str]:
    return [command, *(word for name, value in options.items() for word in ([name, value] if name else [value]))]


@pytest.mark.parametrize("command", NONSENSE)
def test_each_option_alone(refused, command: str) -> None:
    for option, values in NONSENSE[command].items():
        for value in values:
            refused(*_typed(command, GOOD[command] | {option: value}))


def test_many_at_once(refused) -> None:
    choose = random.Random(0)
    for _ in range(LINES):
        command = choose.choice(list(NONSENSE))
        wrong = NONSENSE[command]
        options = dict(GOOD[command])
        options |= dict(choose.sample(list(ALSO_GOOD[command].items()), choose.randint(0, len(ALSO_GOOD[command]))))
        for option in choose.sample(list(wrong), choose.randint(1, min(3, len(wrong)))):
            options[option] = choose.choice(wrong[option])
        named = list(options.items())
        choose.shuffle(named)
        refused(*_typed(command, dict(named)))
