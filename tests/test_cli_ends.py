"""How a process of the command line ends: streams that are closed, full or of another alphabet, interrupts, folders
that cannot be written or are gone, packages that are missing."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import tiny_tokenizer

from flexasl import cli, run
from flexasl.report import Report
from flexasl.tools.text import prose

pytestmark = pytest.mark.cpu("starts commands, which choose a device themselves")

FLEXASL = (sys.executable, "-m", "flexasl")
PIPE = subprocess.PIPE
FULL_DISK = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@pytest.fixture
def ask(folder: Path, tmp_path: Path) -> list[str]:
    """The words of a question about a text, with the tiny model."""
    text = tmp_path / "text.txt"
    text.write_text(prose(300, tiny_tokenizer()))
    return [
        "ask",
        "-f",
        str(text),
        "-q",
        "Why?",
        "--model",
        str(folder),
        "--max-new-tokens",
        "4",
        "--select-tokens",
        "99",
    ]


def ended(arguments: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FLEXASL, *arguments], stderr=PIPE, text=True, timeout=300, **settings)


def shell(arguments: list[str], redirected: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it, with its streams redirected there."""
    command = ["sh", "-c", f'"$@" {redirected}', "sh", *FLEXASL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | variables)


def one_line(err: str) -> str:
    assert err.startswith("flexasl: ") and err.count("\n") == 1, err
    return err


def test_a_closed_standard_output_is_refused_before_the_model_runs(ask: list[str]) -> None:
    done = shell(ask, ">&-")
    assert done.returncode == 2 and "standard output is closed" in one_line(done.stderr)


@pytest.mark.parametrize("arguments", [[], ["--file", "-"]])
def test_a_closed_standard_input_has_no_text(arguments: list[str]) -> None:
    done = shell(["ask", "-q", "Why?", *arguments], "<&-")
    assert done.returncode == 2 and "give" in one_line(done.stderr)


def test_a_closed_standard_error_does_not_send_errors_to_standard_output() -> None:
    done = shell(["ask", "-q", "Why?", "--tau", "7"], "2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@FULL_DISK
def test_full_disks() -> None:
    for argument in ("--version", "--help"):
        done = shell([argument], ">/dev/full")
        assert done.returncode == 2 and "cannot be written: No space left on device" in one_line(done.stderr)
    assert shell(["--nonsense"], "2>/dev/full").returncode == 2


def test_a_reader_that_has_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = ended(["--help"], stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_locale_without_letters(ask: list[str]) -> None:
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell([*ask, "-q", "Wörüm?", "--json"], "", **ascii)
    assert (done.returncode, done.stderr) == (0, "")
    ids = run.question_ids(tiny_tokenizer(), Path(ask[2]).read_text(), "Wörüm?")
    assert json.loads(done.stdout)["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("options", [[], ["--compare"], ["--json"]])
def test_letters_that_the_output_lacks(ask, monkeypatch: pytest.MonkeyPatch, encoding: str, options: list[str]) -> None:
    monkeypatch.setattr(run._Stream, "on_finalized_text", lambda self, text, stream_end=False: self._on_text("[Я ü]"))
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as caught:
        cli.main([*ask, *options])
    text = out.buffer.getvalue().decode(encoding)
    assert caught.value.code == 0
    if "--json" in options:
        assert text.isascii() and json.loads(text)["report"]
    else:
        assert "[\\u042f \\xfc]" in text if encoding == "ascii" else "[\\u042f ü]" in text
        assert text.index("[") < text.index("KV cache")


@pytest.mark.parametrize("code", ["{}", "exec({!r})"])  # of which dataclasses are made
def test_an_interrupt_while_the_command_line_is_imported(tmp_path: Path, code: str) -> None:
    interrupt = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n"
    (tmp_path / "typer.py").write_text(code.format(interrupt))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = ended(["--help"], stdout=PIPE, env=os.environ | {"PYTHONPATH": path}, preexec_fn=_heed_interrupts)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    torch = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\nprint('whole')\n"
    (tmp_path / "torch.py").write_text(f"{torch}def __getattr__(name):\n    time.sleep(10)\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    done = ended(["inspect", __file__], stdout=PIPE, env=environment, preexec_fn=_heed_interrupts)
    assert (done.returncode, done.stdout, done.stderr) == (130, "whole\n", "")


def test_an_interrupt_while_the_process_tidies_up() -> None:
    code = (
        "import atexit, os, signal, sys, time\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.1)))\n"
        "sys.argv = ['flexasl', '--version']\n"
        "from flexasl.tools.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=_heed_interrupts)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("flexasl ")


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_what_was_found_is_printed_though_the_second_run_stops(ask, capsys, monkeypatch, options, stop) -> None:
    answer = run.answer

    def once(*arguments: Any, **settings: Any) -> Any:
        if settings.get("policy") is None and settings["max_new_tokens"] == 4:
            raise stop
        return answer(*arguments, **settings)

    monkeypatch.setattr(run, "answer", once)
    with pytest.raises(SystemExit) as caught:
        cli.main([*ask, "--compare", *options])
    out, err = capsys.readouterr()
    if stop is KeyboardInterrupt:
        assert (caught.value.code, err) == (130, "")
    else:
        assert caught.value.code == 1 and "unexpected MemoryError" in one_line(err)
    assert json.loads(out)["report"] if options else "KV cache" in out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_picture_whose_folder_vanishes_costs_nothing_else(ask, capsys, monkeypatch, tmp_path, options) -> None:
    picture = tmp_path / "vanishing" / "why.png"
    picture.parent.mkdir()
    plot = Report.plot

    def late(self: Report, path: Path) -> Any:
        shutil.rmtree(picture.parent)
        return plot(self, path)

    monkeypatch.setattr(Report, "plot", late)
    with pytest.raises(SystemExit) as caught:
        cli.main([*ask, "--plot", str(picture), *options])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and f"{picture} cannot be written: No such file" in one_line(err)
    assert json.loads(out)["text"] if options else "KV cache" in out


def test_a_prompt_whose_folder_vanishes_is_reported(ask, capsys, monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "vanishing" / "text.safetensors"
    out.parent.mkdir()
    prefill = run.prefill

    def late(*arguments: Any, **settings: Any) -> Any:
        shutil.rmtree(out.parent)
        return prefill(*arguments, **settings)

    monkeypatch.setattr(run, "prefill", late)
    with pytest.raises(SystemExit) as caught:
        cli.main(["prefill", "--out", str(out), "-f", ask[2], "--model", ask[6]])
    printed, err = capsys.readouterr()
    assert caught.value.code == 2 and str(out) in one_line(err) and ".flexasl-" not in err
    assert "KV cache" in printed


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_found_out_before_the_model_runs(ask, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = ended([*ask, "--plot", str(locked / "why.png")], stdout=PIPE)
    assert done.returncode == 2 and f"--plot {locked / 'why.png'} cannot be written" in one_line(done.stderr)


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    command = 'mkdir gone && cd gone && rmdir ../gone && "$@"'
    arguments = ["sh", "-c", command, "sh", *FLEXASL, "ask", "-q", "Why?", "-f", "text.txt"]
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "the current folder does not exist" in one_line(done.stderr)


@pytest.mark.parametrize("package", ["typer", "rich", "transformers"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(ask: list[str], package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from flexasl.tools.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *ask], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"the package {package} is missing; install it with: pip install 'flexasl[cli]'" in one_line(done.stderr)


def test_an_error_that_nobody_foresaw_is_one_line_with_the_way_to_its_traceback(ask, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run, "question_ids", lambda *_: 1 / 0)
    for asked_for in (False, True):
        if asked_for:
            monkeypatch.setenv("FLEXASL_TRACEBACK", "1")
        with pytest.raises(SystemExit) as caught:
            cli.main(ask)
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (1, "")
        *before, said = err.splitlines()
        assert "unexpected ZeroDivisionError: division by zero; set FLEXASL_TRACEBACK=1" in said
        assert ("Traceback" in before[0] and "question_ids" in err) if asked_for else not before


def _heed_interrupts() -> None:
    """Tests that run in the background of a shell have inherited that interrupts are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
