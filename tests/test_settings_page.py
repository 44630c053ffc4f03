"""Every setting and every option of the command line, read from the code; `docs/settings.md` is the result.

`FLEXASL_WRITE_DOCS=1 pytest tests/test_settings_page.py` writes the page anew.
"""

import dataclasses
import inspect
import os
import re
import textwrap
from enum import Enum
from pathlib import Path

import pytest

import flexasl
from flexasl import policies
from flexasl.tools.cli.app import command

pytestmark = pytest.mark.cpu("reads pages and files, not tensors")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"
ENVIRONMENT = {
    "FLEXASL_CACHE_DIR": "Folder of the converted embedded model and of the profiles that calibration stored. Default: "
    "`flexasl` in the user's cache folder.",
    "FLEXASL_TRACEBACK": "With any value, the command line prints a traceback before an error.",
    "FLEXASL_VLLM_CHECKED": "Set by FlexASL for the processes of vLLM: the release that the start has checked.",
}


def arguments(docstring):
    """What the Args of a docstring say, by name, in one line each."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)[1]
    parts = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def filled(text, **indent):
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False, **indent)


def default_of(value):
    if value in (dataclasses.MISSING, inspect.Parameter.empty):
        return "required"
    return f"`{value!r}`"


def entries(told, names, types, defaults):
    """A heading for each setting, with its type and default, and what it does."""
    for name in names:
        kind = str(types[name]).removeprefix("typing.")
        yield f"### {name}\n\n`{kind}`, default {defaults[name]}\n\n{filled(told[name])}\n"


def fields_of(kind):
    parts = dataclasses.fields(kind)
    told, names = arguments(kind.__doc__), [part.name for part in parts]
    assert list(told) == names
    return entries(
        told, names, {part.name: part.type for part in parts}, {p.name: default_of(p.default) for p in parts}
    )


def overview():
    told = arguments(flexasl.ASLConfig.__doc__)
    for part in dataclasses.fields(flexasl.ASLConfig):
        first = re.split(r"(?<=[.:]) ", told[part.name])[0].rstrip(":.")
        yield f"| [`{part.name}`](#{part.name}) | {default_of(part.default)} | {first} |"


def arguments_of_patch():
    told, parts = arguments(flexasl.patch.__doc__), inspect.signature(flexasl.patch).parameters
    assert list(told) == list(parts)
    for name, part in list(parts.items())[3:]:
        yield f"- `{name}`, default {default_of(part.default)}. {told[name]}"


def of_policies():
    for name, kind in policies.POLICIES.items():
        own = [
            part for part in inspect.signature(kind.__init__).parameters.values() if part.name not in ("self", "args")
        ]
        own = [part for part in own if part.kind is not part.VAR_KEYWORD and part.name not in deprecated(kind)]
        for part in own:
            yield f"| `{name}` | `{part.name}` | {default_of(part.default)} |"


def deprecated(kind):
    return re.findall(r"(\w+): deprecated", inspect.getdoc(kind.__init__) or "")


def options(found):
    yield "| option | takes | default | what it does |"
    yield "| --- | --- | --- | --- |"
    for option in found.params:
        positional = option.param_type_name == "argument"
        names = ", ".join(f"`{n.upper() if positional else n}`" for n in (*option.opts, *option.secondary_opts))
        yield f"| {names} | {takes(option)} | {preset(option)} | {escaped(option.help)} |"


def escaped(text):
    return text.replace("|", "\\|").replace("<", "&lt;")


def takes(option):
    """The values of an option, in words."""
    kind = option.type_descriptor.annotation
    if getattr(option, "is_flag", False):
        return "nothing"
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return ", ".join(f"`{one.value}`" for one in kind)
    if option.metavar:
        return option.metavar.lower()
    words = {str: "text", int: "whole number", float: "number"}[kind]
    if option.min is not None and option.max is not None and option.max < 1000:
        return f"{words}, {option.min} to {option.max}"
    return words if option.min is None else f"{words}, at least {option.min}"


def preset(option):
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    if getattr(option, "is_flag", False):
        return f"`{option.opts[0]}`" if option.default else "off"
    value = option.default.value if isinstance(option.default, Enum) else option.default
    return "none" if value is None else f"`{value}`"


def page():
    parts = [
        "# Settings and options",
        "Generated from the code by `FLEXASL_WRITE_DOCS=1 pytest tests/test_settings_page.py`.",
        "The settings of `flexasl.ASLConfig` say how a prompt is pruned. They are also settings of a policy given "
        "as text (`asl:tau=0.3,min_layer=10`) and keys of the JSON file that `--config` reads. "
        "[Policies](policies.md#which-settings-count) lists which of them count under which policy. "
        "[The defaults](defaults.md) explains how their defaults were found.",
        "## In short",
        "\n".join(["| setting | default | what it is |", "| --- | --- | --- |", *overview()]),
        "A default of `None` depends on the model or on other settings. `patch.config` shows what it became.",
        "## Settings of ASLConfig",
        *fields_of(flexasl.ASLConfig),
        "## Settings of a stage",
        "The setting `stages` holds any number of `flexasl.Stage`. As a text a stage is a number of tokens, and from "
        'which layer to which it can be made: `"0.5@5-9"`.',
        *(part.replace("### ", "### stage: ") for part in fields_of(flexasl.Stage)),
        "## Settings of policies",
        "Given with the policy's name: `fixed_layer:layer=9`.",
        "\n".join(["| policy | setting | default |", "| --- | --- | --- |", *of_policies()]),
        "## Arguments of flexasl.patch",
        "Beside `model`, `config` and `policy`:",
        "\n".join(filled(one, subsequent_indent="  ") for one in arguments_of_patch()),
        "## Environment variables",
        "\n".join(
            ["| variable | what it does |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in ENVIRONMENT.items())]
        ),
        "## The command line",
        "`flexasl --version` prints the versions that a bug report needs. `flexasl COMMAND --help`, or `-h`, lists the "
        "options of a command. [The command line](command-line.md) explains them and how errors end.",
    ]
    for name, found in command.commands.items():
        about = inspect.cleandoc(found.help).split("\n\n")[0].replace("\n", " ")
        parts += [f"### flexasl {name}", about, "\n".join(options(found))]
    return "\n\n".join(filled(p) if plain(p) else p.strip() for p in parts) + "\n"


def plain(part):
    return not part.startswith(("|", "#", "-", "`")) and "\n" not in part


def test_the_page_has_every_setting_and_option():
    if os.environ.get("FLEXASL_WRITE_DOCS"):
        PAGE.write_text(page(), encoding="utf-8")
    told = PAGE.read_text(encoding="utf-8")
    assert told == page(), "write it anew: FLEXASL_WRITE_DOCS=1 pytest tests/test_settings_page.py"
    for part in dataclasses.fields(flexasl.ASLConfig):
        assert f"\n### {part.name}\n" in told
    for found in command.commands.values():
        assert all(f"`{option.opts[0]}`" in told or f"`{option.opts[0].upper()}`" in told for option in found.params)


def test_it_names_every_environment_variable_that_the_code_reads():
    named = {
        name for file in (ROOT / "flexasl").rglob("*.py") for name in re.findall(r"FLEXASL_[A-Z_]+", file.read_text())
    }
    assert named == set(ENVIRONMENT)


@pytest.mark.parametrize("name", policies.POLICIES)
def test_settings_of_policies_are_those_that_names_take(name):
    own = re.findall(rf"^\| `{name}` \| `(\w+)` \| `(.*)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for setting, default in own:
        given = {"None": "2", "20.0": "20"}.get(default, default)
        assert getattr(policies.find_policy(f"{name}:{setting}={given}"), setting) == float(given)
