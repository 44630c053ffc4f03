"""Settings that every test shares: offline, few threads, quiet and deterministic."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

settings.register_profile(
    "flexasl", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", settings.get_profile("flexasl"), derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "flexasl"))


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where models and tensors of a test are: on a GPU where there is one. FLEXASL_TEST_DEVICE names another."""
    return torch.device(os.environ.get("FLEXASL_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


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
