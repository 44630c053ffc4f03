"""The docstrings of the public face: their examples, run as doctests, and what the API reference shows of them."""

import doctest
import importlib
import inspect
import re
import tempfile
from pathlib import Path

import pytest
import torch
from models import tiny

import flexasl

pytestmark = pytest.mark.cpu("reads pages and files, not tensors")

API = Path(__file__).parents[1] / "docs" / "api"
MODULES = (
    "attention",
    "config",
    "forward_pass",
    "ops.ranking",
    "ops.selection",
    "patching",
    "policies.base",
    "replaying",
    "stages",
    "tools.calibration.calibrating",
    "tools.evaluation.plans",
    "tools.evaluation.tasks",
)


def examples(name):
    module = importlib.import_module(f"flexasl.{name}")
    # Ops are objects of torch, which a finder does not look into.
    functions = {part: value._init_fn for part, value in vars(module).items() if hasattr(value, "_init_fn")}
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(module, module.__name__)
    found += [test for part, function in functions.items() for test in finder.find(function, part)]
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_do_what_they_say(name):
    found = examples(name)
    assert found
    for test in found:
        model = tiny("llama")
        test.globs |= {"flexasl": flexasl, "torch": torch, "tempfile": tempfile, "ASLConfig": flexasl.ASLConfig}
        test.globs |= {"model": model, "prompt": torch.arange(90)[None]}
        told = []
        results = doctest.DocTestRunner().run(test, out=told.append)
        assert not results.failed, "".join(told)


def shown():
    """What stands on the pages of the API reference, by its name there."""
    pages = "\n".join(page.read_text("utf-8") for page in API.glob("*.md"))
    found = {}
    for name in re.findall(r"^::: flexasl\.([\w.]+)$", pages, re.MULTILINE):
        *modules, last = name.split(".")
        found[name] = getattr(importlib.import_module(".".join(["flexasl", *modules])), last)
    return found


def test_the_reference_has_all_that_is_public():
    there = list(shown().values())
    constants = {"CACHE", "POLICIES", "RULE", "SCORES"}
    for package in ("", ".ops", ".policies", ".tools.evaluation", ".tools.calibration"):
        module = importlib.import_module(f"flexasl{package}")
        public = {part: getattr(module, part) for part in module.__all__ if part not in constants | {"policies"}}
        assert not [part for part, value in public.items() if not any(value is one for one in there)], package


def test_what_is_shown_says_what_it_takes():
    for name, value in shown().items():
        value = getattr(value, "_init_fn", value)
        told = inspect.getdoc(value) or ""
        assert re.match(r"[A-Z`][^.]*\.", told), name
        if not inspect.isfunction(value) or "all other arguments" in told:
            continue
        named = re.findall(r"^    (\w+): [A-Z`\[]", told, re.MULTILINE)
        takes = [part for part in inspect.signature(value).parameters if part not in ("self", "cls")]
        assert len(takes) < 3 or set(takes) <= set(named), (name, set(takes) - set(named))
