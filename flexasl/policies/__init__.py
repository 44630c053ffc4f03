"""What to prune and when. A policy is one small file over the protocol of `base.py`; `table.py` has their names, and
`grammar.py` reads them with settings."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexasl.policies.asl import ASL
from flexasl.policies.asl_two_pass import ASLTwoPass
from flexasl.policies.base import CACHE, RULE, SCORES, Policy
from flexasl.policies.fixed_layer import FixedLayer
from flexasl.policies.full import Full
from flexasl.policies.gemfilter import GemFilter
from flexasl.policies.grammar import choose, find_policy
from flexasl.policies.pyramid_infer import PyramidInfer
from flexasl.policies.pyramid_kv import PyramidKV
from flexasl.policies.snapkv import SnapKV
from flexasl.policies.streaming import Streaming
from flexasl.policies.table import POLICIES

if TYPE_CHECKING:
    from flexasl.retention import Retention, first_and_last, top_k, top_p
    from flexasl.rows_attention import Scored
    from flexasl.selectors import LayerSelector, Prompts, ScheduledSelector, Selection, Selector

__all__ = [
    "ASL",
    "CACHE",
    "POLICIES",
    "RULE",
    "SCORES",
    "ASLTwoPass",
    "FixedLayer",
    "Full",
    "GemFilter",
    "LayerSelector",
    "Policy",
    "Prompts",
    "PyramidInfer",
    "PyramidKV",
    "Retention",
    "ScheduledSelector",
    "Scored",
    "Selection",
    "Selector",
    "SnapKV",
    "Streaming",
    "choose",
    "find_policy",
    "first_and_last",
    "top_k",
    "top_p",
]

_HOMES = dict.fromkeys(("Retention", "first_and_last", "top_k", "top_p"), "retention")
_HOMES |= dict.fromkeys(("LayerSelector", "Prompts", "ScheduledSelector", "Selection", "Selector"), "selectors")
_HOMES["Scored"] = "rows_attention"


def __getattr__(name: str) -> Any:
    """Imports the parts of a policy when they are first used, because they need torch."""
    if name in _HOMES:
        return getattr(import_module(f"flexasl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'flexasl.policies' has no attribute {name!r}")
