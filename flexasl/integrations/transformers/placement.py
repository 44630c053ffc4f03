"""Where a model's weights are: on devices, offloaded, or in part in other processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexasl.errors import UnsupportedError
from flexasl.integrations.transformers.own_config import of_layer

KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def refuse_placement(model: Any, compile: bool) -> None:
    """Raises `UnsupportedError` where a patch cannot run on the model as it is spread over devices or processes."""
    kind, config = type(model).__name__, model.config.get_text_config(decoder=True)
    stage = getattr(model, "_pp_stage", None)
    if stage is not None:
        raise UnsupportedError(
            f"{kind} is split into {stage.pp_size} pipeline stages, and tokens are dropped for all layers in one "
            f"process; load it with DistributedConfig(tp_size={stage.pp_size}) in place of pp_size={stage.pp_size}"
        )
    devices = sorted(map(str, _execution_devices(model)))
    if len(devices) > 1:
        raise UnsupportedError(
            f"{kind} computes on several devices ({', '.join(devices)}); give a device_map with one device that "
            "computes, next to 'cpu' and 'disk' to offload to, or load it with DistributedConfig(tp_size=...)"
        )
    ranks = _ranks(model)
    if ranks == 1:
        return
    if compile:
        raise UnsupportedError(f"compile=True cannot take {kind}, which is split over {ranks} processes; give False")
    layers = [of_layer(config, layer) for layer in range(config.num_hidden_layers)]
    heads = {
        name: math.gcd(*(getattr(layer, name, None) or ranks for layer in layers))
        for name in ("num_attention_heads", "num_key_value_heads")
    }
    splits_heads = any(
        style == "colwise" and name.rpartition(".")[2] in KEY_PROJECTIONS for name, style in model.tp_plan.items()
    )
    if splits_heads and any(count % ranks for count in heads.values()):
        counts = ", ".join(f"{name}={count}" for name, count in heads.items())
        raise UnsupportedError(f"tp_size={ranks} splits a head of {kind} ({counts}); give a divisor of both")


def input_device(model: Any) -> torch.device:
    """Where the model takes its inputs; offloaded weights are on "meta" between passes."""
    embeddings = model.get_input_embeddings()
    devices = _hook_devices(embeddings)
    return devices[0] if devices else embeddings.weight.device


def over_ranks(model: Any) -> Callable[[Tensor, bool], Tensor] | None:
    """Token scores of the processes that have a part of the model's heads each as one: their sum or the highest, which
    gives all of them the same numbers; None where one process has all."""
    if _ranks(model) == 1:
        return None
    mesh = model._device_mesh
    group = (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()

    def reduce(scores: Tensor, highest: bool) -> Tensor:
        scores, how = scores.contiguous(), torch.distributed.ReduceOp
        torch.distributed.all_reduce(scores, how.MAX if highest else how.SUM, group)
        return scores

    return reduce


def _ranks(model: Any) -> int:
    return getattr(model, "tp_size", None) or 1


def _execution_devices(model: Any) -> set[torch.device]:
    return {device for module in model.modules() for device in _hook_devices(module)}


def _hook_devices(module: Any) -> list[torch.device]:
    """Where accelerate's hooks make the module compute; none where it has no hook."""
    hook = getattr(module, "_hf_hook", None)
    places = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    devices = [torch.device(place) for place in places if place is not None]
    return [device if device.type == "cpu" else torch.device(device.type, device.index or 0) for device in devices]
