"""What to prune and when. A policy is one small file over the protocol of `base.py`; `table.py` has their names, and
`grammar.py` reads them with settings."""

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
from flexasl.retention import Retention, first_and_last, top_k, top_p
from flexasl.rows_attention import Scored
from flexasl.selectors import LayerSelector, ScheduledSelector, Selection, Selector
from flexasl.selectors.base import Prompts

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
