"""Dense forward FLOPs of each weight, measured by running one example: 2 per multiply-accumulate, per sample.

Two counts are taken and the larger one holds: at the calls of Linear and convolution modules (which sees through casts
and sharding), and at the matrix products and convolutions themselves (which sees attention projections and heads that
use a weight without calling its module).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.core.sparse.linear import SparseLinear
from rarefy.core.undisturbed import undisturbed

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}


def call(model: Callable[..., Any], batch: Any) -> Any:
    """`model(batch)` for a tensor, `model(*batch)` for a tuple or list, `model(**batch)` for a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def measure(model: nn.Module, example: Any) -> dict[str, float]:
    """FLOPs of one forward sample per weight that is multiplied with, by parameter name (tied weights add up).

    example: one batch as the model takes it; its first axis counts samples. The model runs once in evaluation mode and
    is left as it was; model and example may be on the meta device. Weights of layers that look up (embeddings) or that
    the example does not reach are not listed. Raises ValueError for an example without tensors.

    >>> measure(nn.Linear(3, 5), torch.zeros(2, 3))
    {'weight': 30.0}
    """
    samples = _samples(example)
    names = {id(p): name for name, p in model.named_parameters()}
    names |= {
        id(module.values): f"{prefix}.weight" if prefix else "weight"  # what it is called when it is dense
        for prefix, module in cast(Any, model).named_modules()
        if isinstance(module, SparseLinear)
    }
    by_module: Counter[str] = Counter()

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        weight = module.values if isinstance(module, SparseLinear) else getattr(module, "weight", None)
        if id(weight) in names and args and isinstance(output, Tensor):
            by_module[names[id(weight)]] += 2 * _entries(module) * _positions(module, args[0], output)

    kinds = (nn.Linear, *_CONV, *_TRANSPOSED)
    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    by_product = _Products(model)
    try:
        with undisturbed(model), torch.no_grad(), no_fused_attention(), by_product:
            model.eval()
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    found = by_module | by_product.found  # the larger of both
    return {name: found[name] / samples for name in names.values() if name in found}


def _entries(module: nn.Module) -> int:
    if isinstance(module, SparseLinear):
        return module.structure.rows * module.structure.cols
    return module.get_parameter("weight").numel()


def _positions(module: nn.Module, given: Tensor, output: Tensor) -> int:
    """How often each weight is used: output positions, for transposed convolutions input positions."""
    if isinstance(module, _TRANSPOSED):
        return given.numel() // module.in_channels
    return output.numel() // (module.out_channels if isinstance(module, _CONV) else output.shape[-1])


class _Products(TorchDispatchMode):
    """Counts products with weights, which are known by their storage: a transposed or cut weight is still the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.found: Counter[str] = Counter()
        plain = [(name, p) for name, p in model.named_parameters() if type(p) is nn.Parameter]
        shared = Counter(_storage(p) for _, p in plain)
        self._names = {_storage(p): name for name, p in plain if shared[_storage(p)] == 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            left, right = args[-2:]
            self._note((left, right), 2 * left.numel() * right.shape[-1])
        elif func is _aten.convolution.default:
            given, weight, transposed = args[0], args[1], args[6]
            positions = given.numel() // given.shape[1] if transposed else output.numel() // output.shape[1]
            self._note((weight,), 2 * weight.numel() * positions)
        return output

    def _note(self, factors: tuple[Any, ...], flops: int) -> None:
        plain = (t for t in factors if type(t) in (Tensor, nn.Parameter))
        name = next((n for t in plain if (n := self._names.get(_storage(t))) is not None), None)
        if name is not None:
            self.found[name] += flops


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  its address would be 0 on meta


@contextmanager
def no_fused_attention() -> Generator[None]:
    """torch's attention has a fused path in evaluation mode, inside which no product can be seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _samples(example: Any) -> int:
    values = cast(Mapping[str, Any], example).values() if isinstance(example, Mapping) else example
    tensors = [example] if isinstance(example, Tensor) else [t for t in values if isinstance(t, Tensor)]
    if not tensors or tensors[0].ndim == 0 or tensors[0].shape[0] == 0:
        raise ValueError(
            f"example={type(cast(object, example)).__name__} holds no tensor with samples along its first axis."
        )
    return int(tensors[0].shape[0])
