"""Tiny torchtitan decoders, and the embedded model as one."""

import functools

import torch
import torch.distributed.checkpoint as dcp
from models import HEADS, LAYERS
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3 import Llama3Model, _build_llama3_layers
from torchtitan.models.llama3.sharding import set_llama3_sharding_config
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3 import Qwen3Model, _build_qwen3_layers
from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config

VOCAB, WIDTH, GROUPS, LONGEST = 200, 64, 2, 256
INIT = {"weight": functools.partial(torch.nn.init.normal_, std=0.15)}
ONES = {"weight": torch.nn.init.ones_}


def ends(width, vocab):
    """What comes before and after the layers."""
    return {
        "dim": width,
        "vocab_size": vocab,
        "tok_embeddings": Embedding.Config(num_embeddings=vocab, embedding_dim=width, param_init=INIT),
        "norm": RMSNorm.Config(normalized_shape=width, param_init=ONES),
        "lm_head": Linear.Config(in_features=width, out_features=vocab, param_init=INIT),
    }


SHAPE = {
    "n_layers": LAYERS,
    "dim": WIDTH,
    "n_heads": HEADS,
    "n_kv_heads": GROUPS,
    "hidden_dim": 96,
    "attn_backend": "flex",
}


def llama3():
    rope = ComplexRoPE.Config(dim=WIDTH // HEADS, max_seq_len=LONGEST, theta=500_000, scaling="llama")
    return Llama3Model.Config(**ends(WIDTH, VOCAB), layers=_build_llama3_layers(**SHAPE, rope=rope))


def qwen3():
    rope = CosSinRoPE.Config(dim=32, max_seq_len=LONGEST, theta=1_000_000)
    return Qwen3Model.Config(**ends(WIDTH, VOCAB), layers=_build_qwen3_layers(**SHAPE, head_dim=32, rope=rope))


DECODERS = {"llama3": (llama3, set_llama3_sharding_config), "qwen3": (qwen3, set_qwen3_sharding_config)}


def tiny(name, config=None):
    """A decoder with the name's weights, which are the same each time; on CPU with SDPA, where flex would compile."""
    config = DECODERS[name][0]() if config is None else config
    for layer in config.layers:
        if isinstance(layer.attention.inner_attention, FlexAttention.Config):
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    torch.manual_seed(3)
    model = config.build()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.eval().requires_grad_(False)


def embedded_model(folder):
    """SmolLM2 in torchtitan, its checkpoint read through torchtitan's state-dict adapter."""
    layers = _build_llama3_layers(
        n_layers=30,
        dim=576,
        n_heads=9,
        n_kv_heads=3,
        hidden_dim=1536,
        rope=ComplexRoPE.Config(dim=64, max_seq_len=8192, theta=100_000),
        attn_backend="flex",
    )
    config = Llama3Model.Config(**ends(576, 49152), layers=layers, enable_weight_tying=True)
    model = config.build().eval().requires_grad_(False)
    adapter = Llama3StateDictAdapter(config, str(folder))
    stored = adapter.to_hf(model.state_dict())
    dcp.load(stored, storage_reader=adapter.get_hf_storage_reader(str(folder)))
    model.load_state_dict(adapter.from_hf(stored))
    return model
