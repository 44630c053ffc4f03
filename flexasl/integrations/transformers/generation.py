"""What a patched model does not do when it generates, refused before work starts."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from flexasl.errors import UnsupportedError
from flexasl.integrations.transformers.cache import PrunedCache

MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def guard_generation(model: PreTrainedModel) -> list[str]:
    """Puts checks in front of the model's ways to generate, on this object only; returns the attributes that it set,
    which are to be deleted again."""
    # A model loaded from a folder with `custom_generate` has its own on the object.
    ordinary: Any = type(model)
    generate = vars(model).get("generate", functools.partial(ordinary.generate, model))
    attributes: dict[str, Any] = {
        "generate": functools.partial(_generate, model, generate),
        "_supported_generation_modes": list(MODES),
    }
    attributes |= {name: functools.partial(_refuse_batching, name) for name in BATCHING if hasattr(model, name)}
    for name, value in attributes.items():
        setattr(model, name, value)
    return list(attributes)


def _generate(model: Any, generate: Any, *args: Any, **kwargs: Any) -> Any:
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config

    def given(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    if given("prefill_chunk_size") is not None:
        raise UnsupportedError(
            f"prefill_chunk_size={given('prefill_chunk_size')} is not available on a patched model, which ranks the "
            "tokens of the whole prompt; give prefill_chunk_size=None"
        )
    wanted = given("cache_implementation")
    if wanted not in (None, "dynamic"):
        raise UnsupportedError(
            f"cache_implementation={wanted!r} is not available on a patched model, whose layers have lengths of their "
            "own; give cache_implementation=None"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if given(name) is not None:
            raise UnsupportedError(
                f"{name} is not available on a patched model, because candidates would be read as part of the prompt; "
                f"give {name}=None (a patched model can be the assistant of another one)"
            )
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if isinstance(ids, Tensor) and kwargs.get("inputs_embeds") is None:
        cache = kwargs.get("past_key_values")
        _refuse_other_beginning(ids, kwargs.get("cache") if cache is None else cache)
    return generate(*args, **kwargs)


def _refuse_other_beginning(ids: Tensor, cache: Any) -> None:
    """Raises `UnsupportedError` unless ids [B, N] begin with the tokens that a cache has read and go beyond them."""
    if ids.numel() == 0:
        raise UnsupportedError(f"input_ids are {list(ids.shape)}; give at least one token")
    seen = cache.get_seq_length() if isinstance(cache, PrunedCache) else 0
    if ids.shape[-1] <= seen:
        raise UnsupportedError(
            f"input_ids have {ids.shape[-1]} tokens, which do not go beyond the {seen} that past_key_values has read; "
            "give cache.token_ids with the new ids behind them; for another question, load the cache again or copy it"
        )
    known = cache.token_ids if seen > 0 else None
    if known is None or len(ids) != len(known):
        return
    other = (ids[:, : known.shape[1]].to(known.device) != known) & cache.attention_mask.bool()
    if bool(other.any()):
        row, column = other.nonzero()[0].tolist()
        raise UnsupportedError(
            f"input_ids do not begin with the {known.shape[1]} tokens that past_key_values has read: row {row} differs "
            f"at token {column}; give cache.token_ids with the new ids behind them"
        )


def _refuse_batching(name: str, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError(
        f"{name} is not available on a patched model: continuous batching has its own paged cache; "
        "call generate with a padded batch"
    )
