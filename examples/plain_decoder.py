"""A small GPT-style decoder in plain PyTorch that prunes its prompt: `python examples/plain_decoder.py`.

What belongs to FlexASL is marked `# FlexASL`; docs/own-decoder.md explains it. The weights are random, so the answer
means nothing: what the example shows is where the calls go, and that the pruned run is exact.

Shapes: B batch, M tokens, C width, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexasl import ASLConfig, FlexASLAttention  # FlexASL
from flexasl.cache import LayerCache  # FlexASL
from flexasl.call import Call, LayerStep  # FlexASL
from flexasl.policies import ASL  # FlexASL
from flexasl.prefill import Prefill  # FlexASL
from flexasl.report import Report  # FlexASL


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
        self.attention = FlexASLAttention()  # FlexASL

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, step: LayerStep) -> Tensor:
        normed = self.attention_norm(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = step.attend(query, *step.update(key, value))  # FlexASL
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

    def forward(self, tokens: Tensor, call: Call) -> Tensor:
        """tokens [B, M] int64 → logits [B, M, vocabulary]; those of prompt tokens that were dropped are NaN."""
        hidden = call.start(self.embed(tokens))  # FlexASL
        cos, sin = rotary_tables(call.columns, self.dim)
        for index, block in enumerate(self.blocks):
            step = call.enter(index, block.attention)  # FlexASL
            hidden = block(hidden, call.table(cos), call.table(sin), step)  # FlexASL
            hidden = call.leave(index, step, hidden)  # FlexASL
        return F.linear(self.norm(call.finish(hidden)), self.embed.weight)  # FlexASL


def read_prompt(model: Decoder, prompt: Tensor, config: ASLConfig) -> tuple[Tensor, Call]:
    """Logits [B, M, vocabulary] of a batch of prompts, and the call, whose caches hold what is left of them."""
    caches = [LayerCache() for _ in model.blocks]  # FlexASL
    lengths = [prompt.shape[1]] * prompt.shape[0]  # FlexASL
    rule = ASL().resolve(config, len(caches))  # FlexASL
    prefill = Prefill(ASL(), rule, len(caches), lengths, device=prompt.device)  # FlexASL
    columns = torch.arange(prompt.shape[1], device=prompt.device).expand(prompt.shape)
    call = Call(caches, prefill, columns, None)  # FlexASL
    logits = model(prompt, call)
    call.close()  # FlexASL
    return logits, call


def read_token(model: Decoder, token: Tensor, caches: list[LayerCache]) -> Tensor:
    """Logits [B, 1, vocabulary] after one more token [B, 1], at its true position."""
    columns = torch.full_like(token, caches[0].seen)  # FlexASL
    return model(token, Call(caches, None, columns, None))  # FlexASL


def generate(model: Decoder, prompt: Tensor, config: ASLConfig, new_tokens: int) -> tuple[Tensor, Report]:
    """Greedy continuation [B, new_tokens] of prompts [B, M], and what was decided about them."""
    logits, call = read_prompt(model, prompt, config)
    report = call.report(ASL())  # FlexASL
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < new_tokens:
        tokens.append(read_token(model, tokens[-1], call.caches)[:, -1:].argmax(-1))
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
    config = ASLConfig(select_tokens=64)
    tokens, report = generate(model, prompt, config, 16)
    print(report)
    print("next tokens:", tokens.tolist())
    whole, dropped, masked = (
        read_prompt(model, prompt, choice)[0][:, -1]
        for choice in (ASLConfig(select_tokens=1.0), config, config.replace(propagate="mask"))
    )
    print(f"last logits, tokens dropped or masked out: {(dropped - masked).abs().max():.1e} apart")
    print(f"last logits, tokens dropped or all kept: {(dropped - whole).abs().max():.1e} apart")


if __name__ == "__main__":
    main()
