"""What importing the package does, and does not."""

import subprocess
import sys

import flexasl


def imported(code):
    listing = "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    return subprocess.run(
        [sys.executable, "-c", code + listing], capture_output=True, text=True, check=True
    ).stdout.split()


def test_import_brings_nothing_heavier_than_torch():
    assert not {"transformers", "matplotlib", "rich", "typer", "torchao"} & set(
        imported("import flexasl; flexasl.patch, flexasl.replay, flexasl.policies")
    )


def test_the_command_line_answers_before_torch_is_imported():
    assert "torch" not in imported("import flexasl.cli")


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
