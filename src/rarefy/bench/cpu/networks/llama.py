"""A decoder of the Llama shape with about 1.1 thousand million parameters (Zhang et al., 2024, arXiv:2401.02385).

Its cache of keys and values has a fixed length and does not grow: a call for one token writes its key and value at the
last place and attends to the whole cache, so that every call costs the same.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HasConstants", "Llama"]


@runtime_checkable
class HasConstants(Protocol):
    """A module that can compute its buffers again, after it was made on the meta device."""

    def make_constants(self) -> None:
        """Fill the buffers."""
        ...


class Attention(nn.Module):
    """Grouped attention with rotary positions: of `tokens` tokens to `context` cached ones, or among themselves."""

    def __init__(self, width: int, heads: int, shared: int, context: int) -> None:
        super().__init__()
        self.heads, self.shared, size = heads, shared, width // heads
        self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.k_proj = nn.Linear(width, shared * size, bias=False)
        self.v_proj = nn.Linear(width, shared * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)
        self.keys: Tensor
        self.values: Tensor
        self.register_buffer("keys", torch.empty(1, shared, context, size), persistent=False)
        self.register_buffer("values", torch.empty(1, shared, context, size), persistent=False)
        self.make_constants()

    def make_constants(self) -> None:
        """An empty cache."""
        self.keys.zero_()
        self.values.zero_()

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[1, tokens, width] to the same."""
        _, tokens, width = x.shape
        q = _rotate(self.q_proj(x).view(1, tokens, self.heads, -1).transpose(1, 2), turn)
        k = _rotate(self.k_proj(x).view(1, tokens, self.shared, -1).transpose(1, 2), turn)
        v = self.v_proj(x).view(1, tokens, self.shared, -1).transpose(1, 2)
        if tokens == 1:
            self.keys[:, :, -1:], self.values[:, :, -1:] = k, v
            k, v = self.keys, self.values
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(1, tokens, width))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, width] to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, inner: int, heads: int, shared: int, context: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(width, eps=1e-5)
        self.self_attn = Attention(width, heads, shared, context)
        self.post_norm = nn.RMSNorm(width, eps=1e-5)
        self.mlp = MLP(width, inner)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[1, tokens, width] to the same."""
        x = x + self.self_attn(self.input_norm(x), turn)
        return x + self.mlp(self.post_norm(x))


class Llama(nn.Module):
    """1,100,048,384 parameters by default. Token numbers [1, tokens] to the logits of the last, [1, vocabulary].

    One token is a step of decoding with `context` tokens behind it; several are the reading of a prompt.
    """

    def __init__(
        self, vocabulary: int = 32000, width: int = 2048, inner: int = 5632, depth: int = 22, heads: int = 32,
        shared: int = 4, context: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, inner, heads, shared, context) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.empty(context, width // heads), persistent=False)
        self.register_buffer("sin", torch.empty(context, width // heads), persistent=False)
        self.make_constants()

    def make_constants(self) -> None:
        """Cosines and sines of rotary positions, for every place and entry of a head."""
        context, size = self.cos.shape
        device = self.cos.device
        rates = 10_000.0 ** (-torch.arange(0, size, 2, device=device) / size)
        angles = torch.outer(torch.arange(context, device=device).float(), rates)
        angles = torch.cat([angles, angles], 1)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the last token."""
        count = tokens.shape[1]
        turn = (self.cos[-1:], self.sin[-1:]) if count == 1 else (self.cos[:count], self.sin[:count])
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, turn)
        return self.lm_head(self.norm(x[:, -1]))


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: the two halves of each head are turned by angles that grow with the place."""
    cos, sin = turn
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
