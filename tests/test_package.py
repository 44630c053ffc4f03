"""What importing the package does, and does not; what its help says; what goes into its distributions."""

import dataclasses
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import flexasl

ROOT = Path(__file__).parents[1]
EVALUATION = ["Plan", "Sample", "Setting", "Sources", "Task", "build", "evaluate", "plan", "report", "tasks"]


def imported(code):
    listing = "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    return subprocess.run(
        [sys.executable, "-c", code + listing], capture_output=True, text=True, check=True
    ).stdout.split()


def test_import_brings_nothing_heavier_than_torch():
    assert not {"transformers", "matplotlib", "rich", "typer", "torchao"} & set(
        imported("import flexasl; flexasl.patch, flexasl.replay, flexasl.policies")
    )


@pytest.mark.parametrize("program", ["-m", "/usr/bin/flexasl", "flexasl.exe"])
def test_the_command_line_answers_before_torch_is_imported(program):
    started = f"import sys; sys.argv = [{program!r}]; "
    assert not {"torch", "typer"} & set(imported(f"{started}import flexasl.cli"))
    assert "torch" not in imported(f"{started}import flexasl.tools.cli.app")


def test_help_does_not_import_torch():
    ended = subprocess.run([sys.executable, "-X", "importtime", "-m", "flexasl", "-h"], capture_output=True, text=True)
    assert ended.returncode == 0 and "typer" in ended.stderr
    assert not re.search(r"\| *torch$", ended.stderr, re.MULTILINE)


@pytest.mark.parametrize("code", ["import flexasl, torch", "import torch, flexasl"])
def test_importing_the_package_registers_its_ops(code):
    source = "".join(file.read_text() for file in (ROOT / "flexasl").rglob("*.py"))
    ops = set(re.findall(r'custom_op\(\s*"flexasl::(\w+)"', source))
    assert len(ops) >= 10
    code += f"; print([getattr(torch.ops.flexasl, name).default for name in {ops}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("use", "missing", "extra"),
    [
        ("from flexasl import embedded", "platformdirs", "transformers"),
        ("import flexasl; flexasl.run", "transformers", "transformers"),
        ("from flexasl import evaluation", "filelock", "eval"),
        ("import flexasl; flexasl.calibrate", "numpy", "eval"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(use, missing, extra):
    code = f"import sys; sys.modules[{missing!r}] = None; {use}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"ModuleNotFoundError: flexasl\.\w+ needs {missing}; install it with: pip install 'flexasl\[{extra}\]'", last
    ), ended.stderr


def test_no_fast_path_imports_the_reference():
    assert (
        "flexasl.ops.reference"
        not in subprocess.run(
            [sys.executable, "-c", "import flexasl, sys; flexasl.patch, flexasl.replay; print(*sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    )


def test_every_public_name_is_there():
    assert all(getattr(flexasl, name) is not None for name in flexasl.__all__)
    assert set(flexasl.__all__) <= set(dir(flexasl))
    assert not hasattr(flexasl, "no_such_name")


def test_modules_of_tools_keep_their_public_names():
    def tool(name):
        return importlib.import_module(f"flexasl.tools.{name}")

    for name in ("embedded", "loading", "run", "text", "weights"):
        scope = {}
        exec(f"from flexasl import {name}", scope)
        assert scope[name] is tool(name) is getattr(flexasl, name)
    for name, public in (("cli", ["main"]), ("calibration", ["Calibration", "calibrate"]), ("evaluation", EVALUATION)):
        for module in (getattr(flexasl, name), importlib.import_module(f"flexasl.{name}"), getattr(flexasl, name)):
            assert all(getattr(module, x) is getattr(tool(name), x) for x in public)
    assert flexasl.evaluation.__all__ == tool("evaluation").__all__ == EVALUATION
    assert flexasl.calibration.__all__ == tool("calibration").__all__
    assert (flexasl.calibrate, flexasl.Calibration) == (tool("calibration").calibrate, tool("calibration").Calibration)


def test_what_prunes_imports_no_tool():
    package = ROOT / "flexasl"
    public = {package / name for name in ("__init__.py", "__main__.py", "calibration.py", "cli.py", "evaluation.py")}
    engine = {file for file in package.rglob("*.py") if not file.is_relative_to(package / "tools")} - public
    assert not [file for file in engine if re.search(r"flexasl\.tools|from flexasl import.*tools", file.read_text())]
    code = "import sys, flexasl; flexasl.patch, flexasl.replay, flexasl.policies; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "flexasl.patching" in done.stdout.split() and "flexasl.tools" not in done.stdout


def test_help_tells_of_every_setting():
    for field in dataclasses.fields(flexasl.ASLConfig):
        assert re.search(rf"^ +{field.name}: [A-Z]", inspect.getdoc(flexasl.ASLConfig), re.MULTILINE), field.name


def ends(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=True).stdout


def test_versions_and_help_by_every_door():
    version = ends("flexasl", "--version")
    assert re.fullmatch(rf"flexasl {flexasl.__version__}, Python 3\S+, torch \d\S+, transformers \d\S+\n", version)
    assert ends("flexasl", "-h") == ends("flexasl.cli", "--help") == ends("flexasl")


@pytest.fixture(scope="module")
def commands():
    from flexasl.tools.cli.app import command

    return command.commands


def test_help_shows_defaults(commands, monkeypatch, capsys):
    from flexasl.tools.cli.app import run

    monkeypatch.setenv("COLUMNS", "200")
    for name, command in commands.items():
        run([name, "-h"])
        page = " ".join(re.sub(r"[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
        for option in command.params:
            if isinstance(option.show_default, str):
                assert f"[default: ({option.show_default})]" in page, (name, option.name)
        assert "Default:" not in page
    assert "[default: (the embedded SmolLM2-135M-Instruct)]" in page


def test_every_option_stands_on_a_page(commands):
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", pages))
    for name, command in commands.items():
        for option in command.params:
            words = {word for word in option.opts if word.startswith("--")}
            assert not words or words & named, (name, words)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_source_distribution_has_all_that_is_checked_in():
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"][
        "include"
    ]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    always = {"pyproject.toml", ".gitignore"}
    assert {file.partition("/")[0] for file in listed} - always == {place.removeprefix("/") for place in include}


def test_the_index_page_has_no_link_that_leads_nowhere(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "hatchling.metadata.plugin.interface", SimpleNamespace(MetadataHookInterface=object)
    )
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.without_relative_links((ROOT / "README.md").read_text())
    assert not re.search(r"\]\((?!https://)", page) and "(https://arxiv.org/abs/2601.07667)" in page
    text = "[a page](docs/a.md#part), [docs/b.md](docs/b.md), [limits](#limits), [far](https://example.org)"
    assert hook.without_relative_links(text) == "a page (`docs/a.md`), `docs/b.md`, limits, [far](https://example.org)"
    assert hook.without_relative_links("![A curve](docs/a.png)") == "Picture (`docs/a.png`): A curve"
    hooked = hook.CustomMetadataHook()
    hooked.root, metadata = str(ROOT), {}
    hooked.update(metadata)
    assert metadata["readme"]["text"].startswith("# FlexASL") and "source distribution" in metadata["readme"]["text"]
