"""Releases of vLLM that the tests have not passed with are checked on a tiny model before anything is served."""

import os

import pytest
import torch
from engines import STAGED, folder
from vllm.engine.arg_utils import EngineArgs

from flexasl.errors import UnsupportedError
from flexasl.integrations import vllm as plugin
from flexasl.integrations.vllm import self_check, startup
from flexasl.integrations.vllm.requests import Requests


def configured():
    made = plugin.server_arguments(folder("llama"), "asl", STAGED, rank_by_question=False)
    return EngineArgs(**(made | {"dtype": "float32", "skip_tokenizer_init": True})).create_engine_config()


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr(startup, "TESTED", ("0.1",))
    monkeypatch.setenv(self_check.CHECKED, "")


@pytest.mark.usefixtures("untested")
def test_it_is_checked_once(monkeypatch, caplog):
    configured()
    version = os.environ[self_check.CHECKED]
    assert f"was tested with vLLM 0.1, and this is {version}" in caplog.text
    monkeypatch.setattr(self_check.subprocess, "run", None)
    configured()


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(("code", "why"), [("import sys; sys.exit('the check failed: x')", "x"), ("1 / 0", "Zero")])
def test_a_failed_check_refuses(monkeypatch, code, why):
    run = self_check.subprocess.run
    monkeypatch.setattr(self_check.subprocess, "run", lambda command, **how: run([command[0], "-c", code], **how))
    with pytest.raises(Exception, match=f"flexasl does not work with vLLM .*: a tiny model failed the check: {why}"):
        configured()
    assert not os.environ[self_check.CHECKED]


def test_the_check_itself():
    self_check.check()


def test_the_check_finds_lengths_of_whole_prompts(monkeypatch):
    right = Requests.lost
    monkeypatch.setattr(Requests, "lost", lambda self, requests: torch.zeros_like(right(self, requests)))
    with pytest.raises(UnsupportedError, match="tokens are answered by"):
        self_check.check()
