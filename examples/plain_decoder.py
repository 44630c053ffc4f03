"""A small GPT-style decoder in plain PyTorch that prunes its prompt: `python examples/plain_decoder.py`.

What belongs to FlexASL is marked `# FlexASL`; docs/own-decoder.md explains it. The weights are random, so the answer
means nothing: what the example shows is where the calls go, and that the pruned run is exact.

Shapes: B batch, M tokens, C width, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flexasl  # FlexASL


class Block(nn.Module):
    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.dim = width // heads
        self.query = nn.Linear(width, heads * self.dim, bias=False)
        self.key = nn.Linear(width, groups * self.dim, bias=False)
        self.value = nn.Linear(width, groups * self.dim, bias=False)
        self.out = nn.Linear(heads * self.dim, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = flexasl.FlexASLAttention()  # FlexASL

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, step: flexasl.LayerStep) -> Tensor:
        normed = self.attention_norm(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = step.attention(query, key, value)  # FlexASL
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))


class Decoder(nn.Module):
    def __init__(
        self, vocabulary: int = 257, width: int = 64, heads: int = 4, groups: int = 2, layers: int = 6
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, groups) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.dim = width // heads

    def forward(self, tokens: Tensor, forward_pass: flexasl.ForwardPass) -> Tensor:
        """tokens [B, M] int64 → logits [B, M, vocabulary]; those of prompt tokens that were dropped are NaN."""
        hidden = self.embed(tokens)
        cos, sin = rotary_tables(forward_pass.positions, self.dim)
        for index, block in enumerate(self.blocks):
            hidden, step = forward_pass.before_layer(index, block.attention, hidden)  # FlexASL
            hidden = block(hidden, forward_pass.table(cos), forward_pass.table(sin), step)  # FlexASL
            hidden = forward_pass.after_layer(index, step, hidden)  # FlexASL
        return F.linear(self.norm(hidden), self.embed.weight)


def read(
    model: Decoder, tokens: Tensor, caches: list[flexasl.LayerCache], mask: Tensor, config: flexasl.ASLConfig
) -> tuple[Tensor, flexasl.Report | None]:
    """Logits [B, M, vocabulary] of a batch of prompts, or of tokens [B, M] after what the caches hold, and what was
    decided about prompts. mask [B, all tokens so far] is 0 at padding."""
    forward_pass = flexasl.ForwardPass.begin(caches, mask, config)  # FlexASL
    logits = model(tokens, forward_pass)
    return logits, forward_pass.close()  # FlexASL


def generate(
    model: Decoder, prompt: Tensor, config: flexasl.ASLConfig, new_tokens: int
) -> tuple[Tensor, flexasl.Report | None]:
    """Greedy continuation [B, new_tokens] of prompts [B, M], and what was decided about them."""
    caches = [flexasl.LayerCache() for _ in model.blocks]  # FlexASL
    mask = torch.ones_like(prompt)
    logits, report = read(model, prompt, caches, mask, config)
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < new_tokens:
        mask = F.pad(mask, (0, 1), value=1)
        tokens.append(read(model, tokens[-1], caches, mask, config)[0][:, -1:].argmax(-1))
    return torch.cat(tokens, 1), report


def rotary_tables(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, M, D] at positions [B, M]."""
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, device=positions.device) / dim)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, prompt = Decoder().eval(), torch.randint(257, (2, 400))
    config = flexasl.ASLConfig(select_tokens=64)
    tokens, report = generate(model, prompt, config, 16)
    print(report)
    print("next tokens:", tokens.tolist())
    whole, dropped, masked = (
        read(model, prompt, [flexasl.LayerCache() for _ in model.blocks], torch.ones_like(prompt), choice)[0][:, -1]
        for choice in (flexasl.ASLConfig(select_tokens=1.0), config, config.replace(propagate="mask"))
    )
    print(f"last logits, tokens dropped or masked out: {(dropped - masked).abs().max():.1e} apart")
    print(f"last logits, tokens dropped or all kept: {(dropped - whole).abs().max():.1e} apart")


if __name__ == "__main__":
    main()
