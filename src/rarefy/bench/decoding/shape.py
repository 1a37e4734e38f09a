"""A Llama of transformers with random weights in bfloat16 and zeros in exact numbers, made in seconds.

Values are taken from one pool, and zeros are those of one mask a shape, turned by another number of columns in each
layer: how fast a product runs depends on where zeros are, not on values. Nothing is ever held in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.axes import parse_pattern
from rarefy.bench.cpu.cases import Zeros
from rarefy.bench.cpu.peers.llama import Shape
from rarefy.bench.seeds import generator

__all__ = ["Shape", "make_llama", "thin"]

_POOL = 1 << 22
CONTEXT = 2048


def make_llama(shape: Shape) -> Any:
    """The model, dense, in evaluation mode. The global generator stays where it was."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.depth, num_attention_heads=shape.heads, num_key_value_heads=shape.shared,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, use_cache=True,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    fill(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Norms that change nothing, matrices of variance 1 / inputs."""
    pool = torch.randn(_POOL, generator=generator("decoding weights", 0)).bfloat16()
    first = 0
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.fill_(1)
            continue
        flat, scale = parameter.view(-1), 1 / math.sqrt(parameter.shape[1])
        for begin in range(0, len(flat), _POOL):
            part = flat[begin : begin + _POOL]
            part.copy_(pool.roll(first)[: len(part)]).mul_(scale)
        first += 12_345


@torch.no_grad()
def thin(model: nn.Module, zeros: Zeros) -> tuple[int, int]:
    """Fill all weights anew, with zeros in the Linears of the blocks: how many are kept there, and how many there are.

    The variance of outputs stays the same, so that no activation dies or overflows on its way down.
    """
    fill(model)
    pattern, source = parse_pattern(zeros.pattern), generator(f"decoding {zeros}", 0)
    masks: dict[torch.Size, Tensor] = {}
    kept = weights = 0
    for number, (name, layer) in enumerate(model.named_modules()):
        if not isinstance(layer, nn.Linear) or ".layers." not in name:
            continue
        shape = layer.weight.shape
        if shape not in masks:
            masks[shape] = pattern.project(torch.rand(shape, generator=source), pattern.asked(shape, zeros.sparsity))
        mask = masks[shape].roll(37 * number, 1)
        layer.weight.mul_(1 / math.sqrt(1 - zeros.sparsity)).masked_fill_(~mask, 0)
        kept, weights = kept + int(mask.sum()), weights + mask.numel()
    return kept, weights
