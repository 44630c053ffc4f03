"""The names of policies."""

from __future__ import annotations

from flexasl.policies.asl import ASL
from flexasl.policies.asl_two_pass import ASLTwoPass
from flexasl.policies.base import Policy
from flexasl.policies.fixed_layer import FixedLayer
from flexasl.policies.full import Full
from flexasl.policies.gemfilter import GemFilter
from flexasl.policies.pyramid_infer import PyramidInfer
from flexasl.policies.pyramid_kv import PyramidKV
from flexasl.policies.snapkv import SnapKV
from flexasl.policies.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {
    "asl": ASL,
    "asl_two_pass": ASLTwoPass,
    "fixed_layer": FixedLayer,
    "fastkv": FixedLayer,
    "gemfilter": GemFilter,
    "pyramid_infer": PyramidInfer,
    "snapkv": SnapKV,
    "pyramid_kv": PyramidKV,
    "streaming": Streaming,
    "full": Full,
}
