"""Patches transformers' causal decoders through their own extension points: attention and mask functions, hooks on the
decoder and its layers, and cache layers. The only rooms that import transformers' internals."""

from flexasl.integrations.transformers.cache import PrunedCache, PrunedCacheLayer
from flexasl.integrations.transformers.patch import Patch

__all__ = ["Patch", "PrunedCache", "PrunedCacheLayer"]
