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
    "Policy",
    "PyramidInfer",
    "PyramidKV",
    "SnapKV",
    "Streaming",
    "choose",
    "find_policy",
]
