"""Which layers of a model can be packed, where their zeros are, and what shapes an example brings to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from rarefy.core import Sparsity
from rarefy.core.sparse import SparseLinear
from rarefy.core.undisturbed import undisturbed
from rarefy.runtime.conv import Geometry
from rarefy.runtime.direct import DirectLinear
from rarefy.runtime.layers import geometry_of
from rarefy.runtime.packed import Packed

BLOCKS = (16, 8, 4)
_FILLED = 1.10  # stored entries per kept one that blocks may have
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Seen:
    """What an example brought to a layer. tokens: rows of its input; of a convolution the pixels of its result."""

    tokens: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    feature_major: bool = False
    calls: int = 1


@dataclass(eq=False)
class Layer:
    """A Linear or Conv2d of a model. blocks: stored entries in units of that many rows, where the zeros allow them."""

    name: str
    module: nn.Module
    given: Tensor | None
    tied: bool = False
    kept: int = 0
    blocks: dict[int, int] = field(default_factory=dict[int, int])
    seen: list[Seen] = field(default_factory=list[Seen])

    @property
    def weight(self) -> Tensor:
        """[rows, cols], a view."""
        return cast(Tensor, self.module.weight).detach().flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """[rows] or None."""
        found = cast(Tensor | None, self.module.bias)
        return None if found is None else found.detach()

    @property
    def mask(self) -> Tensor:
        """bool [rows, cols]: the mask that is known, else the weights that are not zero."""
        return self.weight.ne(0) if self.given is None else self.given.flatten(1)

    @property
    def geometry(self) -> Geometry | None:
        """Of a convolution."""
        return geometry_of(self.module) if isinstance(self.module, nn.Conv2d) else None

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / max(1, self.weight.numel())

    @property
    def pattern(self) -> str:
        """As the report says it."""
        if self.kept == self.weight.numel():
            return "dense"
        return f"{max(self.blocks)}×1" if max(self.blocks) > 1 else "unstructured"


def find_layers(model: nn.Module, sparsity: Sparsity | None) -> list[Layer]:
    """The layers that could be packed, in the order of the model; torch's pruning masks are folded into weights.

    Raises ValueError, before anything is changed, for a model that is packed already, is not on the CPU or has weights
    that are not finite.
    """
    _refuse(model)
    masks = {} if sparsity is None else {id(site.parameter): site.mask for site in sparsity.sites}
    pruned = dict(_pruned(model))
    found: list[Layer] = []
    for name, module in named_modules(model):
        given = pruned.get(module)
        if not _eligible(module) or (given is None and not isinstance(module.weight, nn.Parameter)):
            continue  # computed from other parameters, by weight norm or its like
        if given is not None:
            cast(Any, prune).remove(module, "weight")
        layer = Layer(name, module, masks.get(id(module.weight)) if given is None else given.bool())
        layer.tied = _owners(model, cast(Tensor, module.weight)) > 1
        found.append(layer)
    for layer in found:
        _count(layer)
    return found


def _refuse(model: nn.Module) -> None:
    for name, module in named_modules(model):
        if isinstance(module, Packed | DirectLinear):
            raise ValueError(f"{name!r} is packed already: rarefy.unpack(model) first, then pack it anew")
        if isinstance(module, SparseLinear):
            raise ValueError(f"{name!r} is being trained on its non-zeros alone: sparsity.end() first, then pack it")
        if not _eligible(module):
            continue
        weight = cast(Tensor, module.weight)
        if weight.device.type != "cpu":
            raise ValueError(
                f"the weight of {name!r} is on {weight.device}: pack runs models on the CPU, move it there"
            )
        if not bool(weight.detach().isfinite().all()):
            raise ValueError(f"the weight of {name!r} has NaN or infinite entries: pack a model that is finite")


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, by its first name."""
    return list(cast(Any, model).named_modules())


def _eligible(module: nn.Module) -> bool:
    """Only the classes themselves: a subclass may compute something else, or read its weight elsewhere."""
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        if not plain or isinstance(module.padding, str):
            return False
    elif type(module) is not nn.Linear:
        return False
    weight: Any = module.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in _DTYPES and weight.numel() > 0


def _pruned(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Layers whose weight torch.nn.utils.prune computes from `weight_orig` and `weight_mask`."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        parameters = dict(module.named_parameters(recurse=False))
        if _eligible(module) and "weight_mask" in buffers and "weight_orig" in parameters:
            yield module, buffers["weight_mask"]


def _owners(model: nn.Module, weight: Tensor) -> int:
    return sum(p is weight for m in model.modules() for p in m.parameters(recurse=False))


def _count(layer: Layer) -> None:
    layer.blocks = blocks_of(layer.mask)
    layer.kept = layer.blocks[1]


def blocks_of(mask: Tensor) -> dict[int, int]:
    """Stored entries in units of 1, 4, 8 and 16 rows of a mask [rows, cols]; only those that store hardly more."""
    kept = int(mask.sum())
    blocks = {1: kept}
    if kept == mask.numel():
        return blocks
    for block in BLOCKS:
        stored = _units(mask, block) * block
        if len(mask) >= block and stored <= _FILLED * max(1, kept):
            blocks[block] = stored
    return blocks


def _units(mask: Tensor, block: int) -> int:
    """Columns of block rows with a kept entry in them."""
    whole = len(mask) // block * block
    count = int(mask[:whole].view(-1, block, mask.shape[1]).any(1).sum())
    return count + (int(mask[whole:].any(0).sum()) if whole < len(mask) else 0)


# --- examples --------------------------------------------------------------------------------------------------------


def examples_of(example: Any) -> list[Any]:
    """A list is several examples; each is a tensor, a tuple of arguments, or a dict of keyword arguments."""
    listed = list(cast(list[Any], example)) if isinstance(example, list) else [example]
    if not listed:
        raise ValueError("example=[] is no example: give one input of the model, or a list of several")
    return listed


def feed(model: nn.Module, example: Any) -> Any:
    """Call the model with an example."""
    if isinstance(example, Mapping):
        return model(**cast(Mapping[str, Any], example))
    return model(*cast(tuple[Any, ...], example)) if isinstance(example, tuple) else model(example)


def watch(model: nn.Module, layers: Sequence[Layer], examples: Sequence[Any], counts: Sequence[int]) -> None:
    """Run the examples in evaluation mode, leaving the model as it was, and note what each layer is given.

    counts: what one run of an example counts for.
    """
    by_module = {layer.module: layer for layer in layers}
    taken: dict[Layer, dict[tuple[Any, ...], int]] = {layer: {} for layer in layers}
    count = 1

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        layer = by_module[module]
        if args and isinstance(args[0], Tensor):
            key = _seen(layer, args[0])
            taken[layer][key] = taken[layer].get(key, 0) + count

    hooks = [layer.module.register_forward_pre_hook(note) for layer in layers]
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            for example, often in zip(examples, counts, strict=True):
                count = often
                feed(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, found in taken.items():
        layer.seen = [Seen(*key, calls=calls) for key, calls in found.items() if key[0] > 0]


def _seen(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    geometry = layer.geometry
    if geometry is not None:
        height, width = geometry.pixels(x.shape[-2], x.shape[-1])
        return x[..., 0, 0, 0].numel() * height * width, x.dtype, tuple(x.shape), False
    flat = x.reshape(-1, x.shape[-1])
    return len(flat), x.dtype, tuple(x.shape), not x.is_contiguous() and flat.stride(0) == 1 and flat.stride(1) != 1
