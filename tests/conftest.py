"""Settings that every test shares: offline, few threads, quiet and deterministic."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import placing
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

settings.register_profile(
    "flexasl", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", settings.get_profile("flexasl"), derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "flexasl"))


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


ON_CPU = {"chat", "folder", "loaded"}
"""Fixtures that load a model, onto the CPU."""
if placing.DEVICE == placing.PRETENDED:  # ten times as slow
    settings.register_profile("few", settings.get_profile("flexasl"), max_examples=4, phases=[Phase.generate])
    settings.load_profile("few")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of tests that say themselves where their tensors are (`places`): a GPU where there is one."""
    return torch.device("cpu" if placing.DEVICE == placing.PRETENDED else placing.DEVICE)


@pytest.fixture(autouse=True)
def _on_device(request: pytest.FixtureRequest):
    """A test's tensors are made on the device, but for tests that say where themselves, or are for the CPU alone."""
    marks = {mark.name for mark in request.node.iter_markers()}
    if placing.DEVICE == "cpu" or marks & {"cpu", "places"} or ON_CPU & set(request.fixturenames):
        yield
    elif placing.DEVICE == placing.PRETENDED and "real" in marks:
        pytest.skip("not for a pretended GPU")
    else:
        with placing.on(placing.DEVICE):
            yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its tokenizer, as `from_pretrained` reads them."""
    from tiny_chat import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def loaded(folder: Path):
    """That model, and its tokenizer."""
    from flexasl import run

    return run.load_model(str(folder))
