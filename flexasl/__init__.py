"""FlexASL: makes long prompts cheap for decoder language models, by pruning the prompt while the model reads it."""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexasl import policies
    from flexasl.attention import FlexASLAttention, Scoring
    from flexasl.cache import LayerCache
    from flexasl.config import ASLConfig
    from flexasl.errors import ConfigError, FlexASLError, UnsupportedError
    from flexasl.forward_pass import ForwardPass
    from flexasl.layer_step import LayerStep
    from flexasl.masks import Visibility
    from flexasl.patching import load_cache, patch
    from flexasl.replaying import Replay, replay
    from flexasl.report import Report
    from flexasl.retention import Retention
    from flexasl.selectors import LayerSelector, Selection, Selector, StagedSelector
    from flexasl.stages import Stage
    from flexasl.tools import embedded as embedded
    from flexasl.tools import loading as loading
    from flexasl.tools import run as run
    from flexasl.tools import text as text
    from flexasl.tools import weights as weights
    from flexasl.tools.calibration import Calibration, calibrate

__version__ = "0.1.0"

__all__ = [
    "ASLConfig",
    "Calibration",
    "ConfigError",
    "FlexASLAttention",
    "FlexASLError",
    "ForwardPass",
    "LayerCache",
    "LayerSelector",
    "LayerStep",
    "Replay",
    "Report",
    "Retention",
    "Scoring",
    "Selection",
    "Selector",
    "Stage",
    "StagedSelector",
    "UnsupportedError",
    "Visibility",
    "calibrate",
    "load_cache",
    "patch",
    "policies",
    "replay",
]

_HOMES = {
    "ASLConfig": "config",
    "Calibration": "tools.calibration",
    "ConfigError": "errors",
    "FlexASLAttention": "attention",
    "FlexASLError": "errors",
    "ForwardPass": "forward_pass",
    "LayerCache": "cache",
    "LayerSelector": "selectors",
    "LayerStep": "layer_step",
    "Replay": "replaying",
    "Report": "report",
    "Retention": "retention",
    "Scoring": "attention",
    "Selection": "selectors",
    "Selector": "selectors",
    "Stage": "stages",
    "StagedSelector": "selectors",
    "UnsupportedError": "errors",
    "Visibility": "masks",
    "calibrate": "tools.calibration",
    "load_cache": "patching",
    "patch": "patching",
    "replay": "replaying",
}
_TOOLS = {
    **dict.fromkeys(("embedded", "loading", "run", "text", "weights"), "transformers"),
    "cli": "cli",
    **dict.fromkeys(("calibration", "evaluation"), "eval"),
}
"""Modules of tools, and the extra that each needs."""


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name in _HOMES:
        return getattr(_imported(_HOMES[name], _TOOLS.get(_HOMES[name].removeprefix("tools."))), name)
    if name in _TOOLS:
        return _imported(f"tools.{name}", _TOOLS[name])
    if name in __all__:
        return import_module(f"flexasl.{name}")
    raise AttributeError(f"module 'flexasl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _imported(module: str, extra: str | None) -> Any:
    """A module of the package; where a package is missing that one of its extras brings, the error says which."""
    try:
        return import_module(f"flexasl.{module}")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if extra is None or package == "flexasl":
            raise
        message = (
            f"flexasl.{module.removeprefix('tools.')} needs {package}; install it with: pip install 'flexasl[{extra}]'"
        )
        raise ModuleNotFoundError(message, name=error.name) from error


def _register_ops() -> None:
    """Makes `torch.ops.flexasl.*` available. The command line answers before torch is imported, so there they wait for
    what it runs."""
    if sys.argv and (sys.argv[0] == "-m" or PurePath(sys.argv[0]).stem == "flexasl"):
        return
    try:
        import_module("flexasl.rows_attention")  # and by it `flexasl.ops`
    except ModuleNotFoundError as error:  # without torch, the command line says in one line what to install
        if str(error.name).partition(".")[0] != "torch":
            raise


_register_ops()
