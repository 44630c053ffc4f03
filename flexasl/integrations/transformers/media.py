"""Models that read images, sound or video beside text: which may be given them while patched.

Where features take the places of placeholder tokens and the decoder reads on as if they were text, pruning is right. It
is not where image tokens see each other in both directions, have positions of several parts, or are added to deeper
layers by their places.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexasl.errors import UnsupportedError

MERGED = ("llava", "mistral3")
"""Model types in the tests whose features are merged into the embeddings, and that is all."""
PARTS = "its positions have three parts, for time, height and width, where there is an image or a video"
DEEP = "features of its images are added to hidden states of several layers, by their places in the prompt"
BOTH_WAYS = "its image tokens see each other in both directions"
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
    "qwen2_5_vl": PARTS,
    "qwen2_vl": PARTS,
    "qwen3_omni_moe_thinker": DEEP,
    "qwen3_vl": DEEP,
    "qwen3_vl_moe": DEEP,
}
"""Of model types that can be patched for text alone."""
NAMES = ("pixel", "image", "video", "audio", "input_features", "mm_encoder")
"""Parts of the names of arguments that hold something beside text."""


def why_no_media(model_type: str) -> str | None:
    """Why a patched model of a type that reads more than text cannot be given more; None where it can."""
    if model_type in MERGED:
        return None
    return REASONS.get(model_type, f"only {' and '.join(MERGED)} are tested with images")


def refuse_media(model: Any, given: dict[str, Any], why: str) -> None:
    """Raises `UnsupportedError` where one of the arguments is more than text."""
    for name, value in given.items():
        parts = value.values() if isinstance(value, dict) else [value]
        if any(part in name for part in NAMES) and any(one is not None for one in parts):
            raise UnsupportedError(
                f"{name} is not available on a patched model of type {model.config.model_type!r}: {why}; give text "
                "alone, or call patch.remove() first"
            )


def refuse_merged(model: Any, given: dict[str, Any]) -> None:
    """Raises `UnsupportedError` where a decoder is given features to add to its layers."""
    if any(value is not None and "deepstack" in name for name, value in given.items()):
        raise UnsupportedError(f"{type(model).__name__} cannot be given an image while patched: {DEEP}")


def refuse_parts(position_ids: Tensor | None) -> None:
    """Raises `UnsupportedError` where positions [3 or 4, B, M] differ between their parts, as an image's do."""
    if position_ids is not None and position_ids.dim() == 3 and bool((position_ids != position_ids[:1]).any()):
        raise UnsupportedError(
            "position_ids have parts for time, height and width that differ, as where there is an image; a patched "
            "model takes one position for each token"
        )
