"""FlexASL: makes long prompts cheap for decoder language models, by pruning the prompt while the model reads it."""

from flexasl import policies
from flexasl.config import ASLConfig
from flexasl.errors import ConfigError, FlexASLError, UnsupportedError
from flexasl.patching import patch
from flexasl.replay import Replay, replay
from flexasl.selector import LayerSelector, Selection

__version__ = "0.1.0"

__all__ = [
    "ASLConfig",
    "ConfigError",
    "FlexASLError",
    "LayerSelector",
    "Replay",
    "Selection",
    "UnsupportedError",
    "patch",
    "policies",
    "replay",
]
