"""What to prune and when. A policy is one small file over the protocol of `base.py`; this is the table of their
names."""

from __future__ import annotations

from flexasl.errors import FlexASLError
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

__all__ = [
    "ASL",
    "POLICIES",
    "ASLTwoPass",
    "FixedLayer",
    "Full",
    "GemFilter",
    "Policy",
    "PyramidInfer",
    "PyramidKV",
    "SnapKV",
    "Streaming",
    "find_policy",
]


def find_policy(policy: str | Policy) -> Policy:
    """The policy of that name with its own defaults, or the instance itself."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]()
    raise FlexASLError(f"policy={policy!r} is not known; give one of {', '.join(POLICIES)}, or an instance of a policy")
