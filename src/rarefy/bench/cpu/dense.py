"""torch's ways of y = x Wᵀ, as calls on copies of the weight: dense fp32, bf16 and dynamic int8, and sparse CSR."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["copies", "dynamic_int8", "dynamic_int8_model", "packed_int8", "torch_csr", "torch_dense"]

Call = Callable[[], object]


def copies(nbytes: int, cache: int, regime: str) -> int:
    """How many copies of a weight of that size are cycled through: one when hot, thrice the cache's size when cold.

    >>> copies(1 << 20, 32 << 20, "cold"), copies(1 << 20, 32 << 20, "hot"), copies(1 << 30, 32 << 20, "cold")
    (96, 1, 1)
    """
    return 1 if regime == "hot" else max(1, -(-3 * cache // max(1, nbytes)))


def torch_dense(weight: Tensor, x: Tensor, dtype: torch.dtype, count: int) -> list[Call]:
    """`nn.Linear` without a bias, weight and x in that dtype."""
    x = x.to(dtype)
    calls: list[Call] = []
    for _ in range(count):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=dtype)
        layer.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
        calls.append(_bound(layer, x))
    return calls


def dynamic_int8(weight: Tensor, x: Tensor, count: int) -> list[Call]:
    """What `quantize_dynamic` puts in a Linear's place: int8 weight per output, x quantised per call, in fp32."""
    run = torch.ops.quantized.linear_dynamic
    weights = [packed_int8(weight) for _ in range(count)]
    return [lambda w=w: run(x, w, False) for w in weights]


def packed_int8(weight: Tensor, bias: Tensor | None = None) -> torch.ScriptObject:
    """torch's prepacked int8 weight, one scale an output."""
    scales = weight.abs().amax(1).clamp_min(1e-12) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with _quiet():
        quantised = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantised, bias)


def torch_csr(weight: Tensor, x: Tensor, count: int) -> list[Call]:
    """`W_csr @ xᵀ`, the faster of torch's two ways with CSR by far; y comes as a view in torch's layout."""
    turned = x.t().contiguous()
    with _quiet():
        matrices = [weight.to_sparse_csr() for _ in range(count)]
    return [lambda w=w: (w @ turned).t() for w in matrices]


def _bound(layer: nn.Module, x: Tensor) -> Call:
    return lambda: layer(x)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that CSR is in beta and that quantised tensors will go: what there is now is what is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class _DynamicInt8(nn.Module):
    """A Linear as `quantize_dynamic` makes it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.packed = packed_int8(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, False)


def dynamic_int8_model(model: nn.Module, chosen: Callable[[str, nn.Linear], bool]) -> nn.Module | None:
    """A copy of the model with torch's dynamic int8 in the place of the chosen Linears; None where there are none."""
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return None
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, nn.Linear) and chosen(name, layer):
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, _DynamicInt8(layer))
    return twin
