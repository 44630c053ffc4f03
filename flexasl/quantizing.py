"""Cache entries in eight bits: each entry of a head has a scale of its own, for its key and for its value.

Shapes: B batch, G KV heads, N entries, D head dim.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flexasl.errors import UnsupportedError

NUMBERS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
SCALES = torch.float16
"""bfloat16 would round the scale so far that the largest number, often an outlier that all logits depend on, is wrong
by half a step; float16 leaves it within a sixteenth."""
SMALLEST_SCALE = 2.0**-17
"""Below it float16 rounds a scale by more than half a step of the largest number."""


def quantize(states: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """states [B, G, N, D] as numbers of eight bits [B, G, N, D] and their scales [B, G, N, 1] float16, both in memory
    of their own. Symmetric: 0 stays 0, and in int8 no number is wrong by more than half its scale."""
    affine, number = primitives(kv_dtype), NUMBERS[kv_dtype]
    most, block = LARGEST[number], (1, 1, 1, states.shape[-1])
    wide = states.detach().float().contiguous()
    settings = {"eps": SMALLEST_SCALE, "scale_dtype": torch.float32, "keepdim": True}
    symmetric = affine.MappingType.SYMMETRIC
    scales, zeros = affine.choose_qparams_affine(wide, symmetric, block, number, -most, most, **settings)
    scales = scales.clamp(max=torch.finfo(SCALES).max).to(SCALES)
    if number.is_floating_point:
        # torchao's affine quantiser would round to whole numbers first.
        return (wide / scales).clamp(-most, most).to(number), scales
    return affine.quantize_affine(wide, block, scales.float(), zeros, number, -most, most), scales


def quantize_both(keys: Tensor, values: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers of keys and values [B, G, N, D], then the scales of both [B, G, N, 1]."""
    if keys.shape[-1] == values.shape[-1]:  # one call in place of two: for a new token, calls are all the time
        numbers, scales = quantize(torch.cat([keys, values], 1), kv_dtype)
        key_numbers, value_numbers, key_scales, value_scales = *numbers.chunk(2, 1), *scales.chunk(2, 1)
        return key_numbers, value_numbers, key_scales, value_scales
    (key_numbers, key_scales), (value_numbers, value_scales) = (quantize(part, kv_dtype) for part in (keys, values))
    return key_numbers, value_numbers, key_scales, value_scales


def dequantize(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` was given, in dtype and up to rounding."""
    kv_dtype = name_of(numbers.dtype)
    assert kv_dtype is not None
    block, most = (1, 1, 1, numbers.shape[-1]), LARGEST[numbers.dtype]
    made: Tensor = primitives(kv_dtype).dequantize_affine(
        numbers,
        block,
        scales,
        None,
        numbers.dtype,
        -most,
        most,
        output_dtype=torch.float32 if dtype == torch.float64 else dtype,
    )
    return made.to(dtype)


def name_of(dtype: torch.dtype) -> str | None:
    """The `kv_dtype` whose numbers are of this type; None where there is none."""
    return next((name for name, number in NUMBERS.items() if number == dtype), None)


def primitives(kv_dtype: str) -> Any:
    """torchao's quantisation primitives; raises `UnsupportedError` where they cannot be imported."""
    try:
        return _imported()
    except ImportError as error:
        raise UnsupportedError(
            f"kv_dtype={kv_dtype!r} needs torchao ({error}); install it with: pip install 'flexasl[quant]'"
        ) from error


@functools.cache
def _imported() -> Any:
    with _only_errors("torchao", "torch.utils._pytree"):
        return importlib.import_module("torchao.quantization.quant_primitives")


@contextlib.contextmanager
def _only_errors(*names: str) -> Iterator[None]:
    """Silences warnings of these loggers: torchao's of kernels that a machine without a GPU has no use for."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
