"""What a patched model does not do when it generates, refused before work starts."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from flexasl.errors import UnsupportedError
from flexasl.integrations.questions import asking, repeated
from flexasl.integrations.transformers.adapters import forgetting_rows
from flexasl.integrations.transformers.cache import PrunedCache

MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
OTHER_MODES = {
    GenerationMode.CONTRASTIVE_SEARCH: ("penalty_alpha",),
    GenerationMode.DOLA_GENERATION: ("dola_layers",),
    GenerationMode.GROUP_BEAM_SEARCH: ("num_beam_groups",),
    GenerationMode.CONSTRAINED_BEAM_SEARCH: ("constraints", "force_words_ids"),
}
"""Ways to generate that a patched model does not know, and the settings that ask for them."""
GUESSES = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Settings that have tokens guessed, which are then read several at a time."""
BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def guard_generation(model: PreTrainedModel) -> list[str]:
    """Puts checks in front of the model's ways to generate, on this object only; returns the attributes that it set,
    which are to be deleted again."""
    # A model loaded from a folder with `custom_generate` has its own on the object.
    ordinary: Any = type(model)
    generate = vars(model).get("generate", functools.partial(ordinary.generate, model))
    attributes: dict[str, Any] = {"generate": functools.partial(_generate, model, generate)}
    attributes |= {name: functools.partial(_refuse_batching, name) for name in BATCHING if hasattr(model, name)}
    for name, value in attributes.items():
        setattr(model, name, value)
    return list(attributes)


def _generate(model: Any, generate: Any, *args: Any, **kwargs: Any) -> Any:
    patch = model.flexasl_patch
    question = kwargs.pop("question", patch.question)
    given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    with forgetting_rows(model):
        patch.refuse_media(given)
        settings = {name: value for name, value in given.items() if name != "generation_config"}
        # As `generate` itself does: what the user leaves open is taken from the model's own configuration.
        merged, _ = model._prepare_generation_config(given.get("generation_config"), **settings)
        _refuse_settings(merged, given.get("assistant_model"))
        ids = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
        if isinstance(ids, Tensor) and given.get("inputs_embeds") is None:
            cache = given.get("cache") if given.get("past_key_values") is None else given["past_key_values"]
            _refuse_other_beginning(ids, cache)
        _refuse_guessed_mask(ids, given.get("attention_mask"), merged.pad_token_id, merged.eos_token_id)
        copies = max(merged.num_beams or 1, merged.num_return_sequences or 1)
        with asking(patch, repeated(question, copies)):
            return generate(*args, **kwargs)


def _refuse_settings(settings: Any, assistant: Any) -> None:
    """Raises `UnsupportedError` where the settings of a generation ask for what a patched model does not do."""
    if settings.prefill_chunk_size is not None:
        raise UnsupportedError(
            f"prefill_chunk_size={settings.prefill_chunk_size} is not available on a patched model, which ranks the "
            "tokens of the whole prompt; give prefill_chunk_size=None"
        )
    if settings.cache_implementation not in (None, "dynamic"):
        raise UnsupportedError(
            f"cache_implementation={settings.cache_implementation!r} is not available on a patched model, whose layers "
            "have lengths of their own; give cache_implementation=None"
        )
    guesses = {name: getattr(settings, name, None) for name in GUESSES} | {"assistant_model": assistant}
    for name, value in guesses.items():
        if value is not None and value is not False:
            raise UnsupportedError(
                f"{name} is not available on a patched model, because candidates would be read as part of the prompt; "
                f"give {name}=None (a patched model can be the assistant of another one)"
            )
    mode = settings.get_generation_mode()
    if mode not in MODES:
        raise UnsupportedError(
            f"{' or '.join(OTHER_MODES.get(mode, ()) or ['this way of generating'])} is not available on a patched "
            f"model, because it asks for {mode.value}; give a way to generate among "
            f"{', '.join(one.value for one in MODES)}"
        )


def _refuse_guessed_mask(ids: Any, mask: Any, pad: Any, eos: Any) -> None:
    """Raises `UnsupportedError` where `generate`, which was given no mask, would take tokens for padding that are
    not."""
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if mask is not None or not isinstance(pad, int) or pad in ends or not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    wrong = (ids == pad) & (ids != pad).cumsum(1).bool()
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise UnsupportedError(
            f"input_ids have pad_token_id={pad} behind other tokens (row {row}, token {column}), and generate masks it "
            "out where no attention_mask is given; give attention_mask, with ones at all tokens that count"
        )


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
