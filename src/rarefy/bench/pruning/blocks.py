"""Llama-shaped blocks with random weights, and inputs that are made anew at each call: nothing but ids is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.seeds import generator

__all__ = ["FULL", "QUICK", "Model", "Shape", "make"]


@dataclass(frozen=True)
class Shape:
    """A block of this width, calibrated on `tokens` tokens in sequences of `length`."""

    width: int
    tokens: int
    length: int = 2048

    @property
    def hidden(self) -> int:
        """Of the MLP: as the Llama of 7 billion parameters has it for 4096, else 11/4 of the width."""
        return 11008 if self.width == 4096 else self.width * 11 // 4

    @property
    def heads(self) -> int:
        """Of 64 features each; 128 from a width of 4096 on."""
        return self.width // (128 if self.width >= 4096 else 64)

    @property
    def sequences(self) -> int:
        """How many make the tokens."""
        return self.tokens // self.length

    def __str__(self) -> str:
        return f"{self.width}, {self.tokens // 1024}k tokens"


FULL = (Shape(1024, 1 << 16), Shape(2048, 1 << 16), Shape(4096, 1 << 14))
QUICK = (Shape(256, 1 << 13, 1024), Shape(512, 1 << 13, 1024))


class _Inputs(nn.Module):
    """Hidden states of a sequence, from its number alone: a few strong directions and noise, as activations have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rank = max(1, width // 8)
        source = generator("benchmark directions", width)
        self.register_buffer("directions", torch.randn(rank, width, generator=source) / rank**0.5)
        self.register_buffer("scale", torch.rand(width, generator=source) + 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        directions, scale = self.get_buffer("directions"), self.get_buffer("scale")
        rows = []
        for number in ids[:, 0].tolist():
            source = generator("benchmark inputs", number)
            strong = torch.randn(ids.shape[1], len(directions), generator=source).to(scale) @ directions
            noise = torch.randn(ids.shape[1], len(scale), generator=source).to(scale)
            rows.append((strong + 0.3 * noise) * scale)
        return torch.stack(rows)


class _Tail(nn.Module):
    """What comes after the block, so that its outputs are asked for; it costs next to nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 8, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(hidden)


class Model(nn.Module):
    """ids [sequences, tokens] → inputs → one block of Llama → tail. `block` is what is pruned and timed."""

    def __init__(self, shape: Shape) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        super().__init__()
        config = LlamaConfig(
            hidden_size=shape.width, intermediate_size=shape.hidden, num_attention_heads=shape.heads,
            num_key_value_heads=max(1, shape.heads // 4), num_hidden_layers=1, max_position_embeddings=shape.length,
        )  # fmt: skip
        config._attn_implementation = "sdpa"  # torch's own, as a model loaded by transformers has it
        self.inputs = _Inputs(shape.width)
        self.rotary = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0), _Tail(shape.width)])

    @property
    def block(self) -> nn.Module:
        """The block."""
        return self.layers[0]

    def call(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the block is called with: hidden states, and the arguments by name."""
        hidden = self.inputs(ids)
        positions = torch.arange(ids.shape[1])[None]
        return hidden, {"position_embeddings": self.rotary(hidden, positions)}

    def forward(self, ids: Tensor) -> Tensor:
        hidden, named = self.call(ids)
        return self.layers[1](self.block(hidden, **named))


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Model, list[Tensor]]:
    """The model, in evaluation mode, and its batches: one sequence each, told by its number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.width)
        model = Model(shape)
    return model.to(dtype).eval(), [torch.full((1, shape.length), i) for i in range(shape.sequences)]
