"""Models that read images, sound or video beside text: which may be given them while patched, and what became of them.

Features take the places of placeholder tokens, and the decoder reads on as if they were text. Some models give them
positions of several parts, of which rotary tables are made as of any, or add further features to the outputs of their
first layers. In some, the tokens of an image see each other in both directions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flexasl.errors import UnsupportedError
from flexasl.report import ImageReport, Report, also

TESTED = (
    "gemma3",
    "gemma4",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)
"""Model types in the tests."""
PARTS = "its positions have three parts, for time, height and width, where there is an image or a video"
DEEP = "features of its images are added to hidden states of several layers, by their places in the prompt"
BOTH_WAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "gemma3": ("token_type_ids", (1,)),
    "gemma4": ("mm_token_type_ids", (1, 2)),
    "paligemma": ("token_type_ids", (0,)),
}
"""Of model types whose neighbouring tokens of these kinds see each other in both directions, the argument that tells
the kinds."""
ONE_TURN = ("paligemma",)
"""Those of them that are read in one turn: unpatched, tokens of a later one see none after them."""
REASONS = {
    "cohere_compass": DEEP,
    "ernie4_5_vl_moe": PARTS,
    "glm46v": PARTS,
    "glm4v": PARTS,
    "glm4v_moe": PARTS,
    "glm_ocr": PARTS,
    "granite4_vision": DEEP,
    "paddleocr_vl": PARTS,
    "qwen2_5_omni_thinker": PARTS,
    "qwen3_omni_moe_thinker": DEEP,
}
"""Of model types that can be patched for text alone."""
NAMES = ("pixel", "image", "video", "audio", "input_features", "mm_encoder")
"""Parts of the names of arguments that hold something beside text."""


def why_no_media(model_type: str) -> str | None:
    """Why a patched model of a type that reads more than text cannot be given more; None where it can."""
    if model_type in TESTED:
        return None
    return REASONS.get(model_type, f"only {', '.join(TESTED)} are tested with images")


def refuse_media(model: Any, given: dict[str, Any], why: str) -> None:
    """Raises `UnsupportedError` where one of the arguments is more than text."""
    for name, value in given.items():
        parts = value.values() if isinstance(value, dict) else [value]
        if any(part in name for part in NAMES) and any(one is not None for one in parts):
            raise UnsupportedError(
                f"{name} is not available on a patched model of type {model.config.model_type!r}: {why}; give text "
                "alone, or call patch.remove() first"
            )


class Given:
    """What a model that reads images was given, which its decoder does not see; no tuple, which other libraries' hooks
    would copy on the way down."""

    def __init__(self, config: Any, given: dict[str, Any]) -> None:
        self.ids: Tensor | None = given.get("input_ids")
        """[B, M], placeholder tokens among them."""
        self.mask: Tensor | None = given.get("attention_mask")
        name, self._kinds = BOTH_WAYS.get(config.model_type, ("", ()))
        self._kind = config.model_type
        self._types: Tensor | None = given.get(name) if _both_ways(config) else None

    def see_later_ones(self, count: int, past: int) -> dict[str, Any]:
        """What `BasePatch.begin` takes of so many new tokens, some of which see later ones: nothing where none does.
        Raises `UnsupportedError` where the model cannot have them in a later turn."""
        if self._types is None or count == 1:
            return {}
        kinds = torch.tensor(self._kinds, dtype=self._types.dtype, device=self._types.device)
        marked = torch.isin(self._types[:, -count:], kinds)
        at = torch.arange(count, dtype=torch.int64, device=marked.device)
        others = at.masked_fill(marked, count)
        following = others.flip(1).cummin(1).values.flip(1)
        last_seen = torch.where(marked, following - 1, at)
        ahead = int((last_seen - at).max())
        if ahead == 0:
            return {}
        if past and self._kind in ONE_TURN:
            raise UnsupportedError(
                f"a later turn of a model of type {self._kind!r} has tokens that see each other in both directions, "
                "which the model itself has in a first turn alone; give all of them there"
            )
        return {"last_seen": last_seen, "ahead": ahead}


def in_order(config: Any, layers: int) -> list[int]:
    """Layers in which the tokens of an image do not see each other, though in others they do."""
    if config.model_type != "gemma4" or not _both_ways(config):
        return []
    kinds = config.get_text_config(decoder=True).layer_types
    return [layer for layer in range(layers) if kinds[layer] != "sliding_attention"]


def _both_ways(config: Any) -> bool:
    """Whether tokens of an image see each other in some layers."""
    small = config.model_type == "gemma4" and config.get_text_config().use_bidirectional_attention != "vision"
    return config.model_type in BOTH_WAYS and not small


def layers_added_to(model: Any, given: dict[str, Any], why: str | None) -> int:
    """To how many of the first layers' outputs a decoder is to add features; raises `UnsupportedError` where the model
    may not be given any, which is why."""
    added = next((value for name, value in given.items() if "deepstack" in name and value is not None), ())
    if len(added) and why is not None:
        raise UnsupportedError(f"{type(model).__name__} cannot be given an image while patched: {DEEP}")
    return len(added)


def refuse_parts(position_ids: Tensor | None) -> None:
    """Raises `UnsupportedError` where positions [3 or 4, B, M] differ between their parts, as an image's do."""
    if position_ids is not None and position_ids.dim() == 3 and bool((position_ids != position_ids[:1]).any()):
        raise UnsupportedError(
            "position_ids have parts for time, height and width that differ, as where there is an image; a patched "
            "model takes one position for each token"
        )


PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Names in configurations of the tokens whose places features take."""


def with_images(report: Report, config: Any, ids: Tensor | None, lengths: list[int]) -> Report:
    """The report with what became of every image of the prompts, ids [B, M], padded on the left."""
    known = {getattr(config, name, None) for name in PLACEHOLDERS} - {None}
    if ids is None or not known or ids.shape[0] != len(report.rows):
        return report
    found = torch.isin(ids, torch.tensor(sorted(known), dtype=ids.dtype, device=ids.device)).cpu()
    if not bool(found.any()):
        return report
    rows = []
    for row, marks, length in zip(report.rows, found, lengths, strict=True):
        kept, images = set(row.kept_positions), []
        own = marks[len(marks) - length :].tolist()
        for start, end in _runs(own):
            going = sum(at in kept for at in range(start, end))
            images.append(ImageReport(first=start, tokens=end - start, kept_tokens=going))
        rows.append(dataclasses.replace(row, images=tuple(images)))
    return also(report, rows=tuple(rows))


def _runs(marks: list[bool]) -> list[tuple[int, int]]:
    """Where runs of True begin and end."""
    edges = [at for at, (one, other) in enumerate(zip([False, *marks], [*marks, False])) if one != other]
    return list(zip(edges[::2], edges[1::2]))
