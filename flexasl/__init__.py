"""FlexASL: makes long prompts cheap for decoder language models, by pruning the prompt while the model reads it."""

from importlib import import_module
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
_TOOLS = ("calibration", "cli", "embedded", "evaluation", "loading", "run", "text", "weights")


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that the command line answers before torch has been imported."""
    if name in _HOMES:
        return getattr(import_module(f"flexasl.{_HOMES[name]}"), name)
    if name in _TOOLS:
        return import_module(f"flexasl.tools.{name}")
    if name in __all__:
        return import_module(f"flexasl.{name}")
    raise AttributeError(f"module 'flexasl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
