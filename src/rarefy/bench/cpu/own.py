"""This library's candidates for y = x Wᵀ: single kernels, called with as little as possible around them, and what
`rarefy.pack` chooses, called as the module that a user has.

A kernel's call is one `rarefy_run` with everything prepared. Its name says form and algorithm: "kernel bitmap/few".
"""

import copy
import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.cpu.cases import Zeros
from rarefy.bench.cpu.document import KERNEL, LAYER
from rarefy.bench.cpu.machine import last_level_cache
from rarefy.runtime import forms, kernels
from rarefy.runtime.kernels import Algorithm, DType, Form
from rarefy.runtime.layers import PackedLinear
from rarefy.runtime.pack import pack
from rarefy.runtime.report import PackReport
from rarefy.runtime.ways import TORCH

__all__ = [
    "AS_LAYER", "CHOSEN", "DENSE", "Kernel", "dense_kernels", "pack_layer", "packed", "packed_in_place",
    "sparse_kernels",
]  # fmt: skip

Call = Callable[[], object]

DENSE = "rarefy dense "
"""Beginning of the names of this library's dense kernels."""
AS_LAYER = " as a layer"
"""End of the names of those that are called as the module that a user has."""
CHOSEN = "chosen kernel"
"""The fact of a row that names the candidate which pack's choice runs."""

_DTYPES = {"fp32": DType.F32, "bf16": DType.BF16, "int8": DType.I8}
_ALGORITHMS = {1: (Algorithm.FEW,), 7: (Algorithm.FEW, Algorithm.MANY, Algorithm.EXPAND)}
_MANY = (Algorithm.MANY, Algorithm.EXPAND)


@dataclass
class Kernel:
    """One product with everything prepared: x [tokens, in] and y [tokens, out], fp32 both.

    Feature-major in memory from 8 tokens on, as activations are between packed layers.
    """

    stored: Any
    algorithm: Algorithm
    x: Tensor
    threads: int
    y: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.y = self.x.new_empty((self.stored.shape[0], len(self.x))).t()
        if len(self.x) < 8:
            self.y = self.y.contiguous()
        kind = DType.BF16 if self.x.dtype == torch.bfloat16 else DType.F32
        self._pointer = ctypes.pointer(self.stored.weight())
        step = kernels.Step(
            kernels.Operation.LINEAR, kernels.Activation.NONE, 0, -1, 1, 0, None,
            (ctypes.POINTER(kernels.Weight) * kernels.BUCKETS)(*[self._pointer] * kernels.BUCKETS),
            (ctypes.c_int32 * kernels.BUCKETS)(*[int(self.algorithm)] * kernels.BUCKETS), 0,
        )  # fmt: skip
        self._steps = (kernels.Step * 1)(step)
        slots = [kernels.slot(t, t.shape[1], kind) for t in (self.x, self.y)]
        self._slots = (kernels.Slot * 2)(*slots)

    def call(self) -> Call:
        """The call itself. Raises RuntimeError at once where no kernel does it."""
        library = kernels.library()
        if library is None:
            raise RuntimeError("there are no compiled kernels")
        run, steps, slots, tokens, threads = library.rarefy_run, self._steps, self._slots, len(self.x), self.threads
        code = run(steps, 1, slots, 2, tokens, threads)
        if code:
            raise RuntimeError(f"the kernel returned {code}")
        hold = self  # the call keeps weights and activations alive

        def call() -> object:
            return run(steps, 1, slots, 2, tokens, threads) or hold

        return call


def _activations(x: Tensor) -> Tensor:
    """x as packed layers hand it on: feature-major from 8 tokens on."""
    return x.contiguous() if len(x) < 8 else x.t().contiguous().t()


def _algorithms(form: Form, tokens: int) -> tuple[Algorithm, ...]:
    if form is Form.LUT:
        return (Algorithm.FEW if tokens < 8 else Algorithm.MANY,)
    return next((algorithms for most, algorithms in _ALGORITHMS.items() if tokens <= most), _MANY)


def _stored(weight: Tensor, mask: Tensor | None, dtype: str, form: Form, block: int) -> Any:
    """The weight in a form, in values of that dtype."""
    scales = None
    if dtype == "bf16":
        weight = weight.bfloat16()
    elif dtype == "int8":
        weight, scales = forms.quantize(weight, torch.ones_like(weight, dtype=torch.bool) if mask is None else mask)
    return forms.encode(weight, mask=mask, form=form, block=block, scales=scales)


def _again(stored: Any) -> Any:
    """The same weight in other memory."""
    return forms.from_bytes(stored.bytes.clone())


def dense_kernels(weight: Tensor, x: Tensor, dtype: str, count: Callable[[int], int], threads: int) -> dict[str, Any]:
    """This library's dense kernel of that dtype, alone and as a layer: name to calls, or to the reason why there are
    none."""
    algorithm = Algorithm.FEW if len(x) < 8 else Algorithm.MANY
    choice = _Choice(Form.DENSE, algorithm, 1)
    return {
        f"{DENSE}{dtype}": _calls(weight, None, x, dtype, choice, count=count, threads=threads),
        f"{DENSE}{dtype}{AS_LAYER}": _layers(weight, x, dtype, count),
    }


def _layers(weight: Tensor, x: Tensor, dtype: str, count: Callable[[int], int]) -> list[Call] | str:
    """Packed layers that are dense, as pack makes them where its dense kernels win."""
    try:
        first = _stored(weight, None, dtype, Form.DENSE, 1)
        stored = [first, *(_again(first) for _ in range(count(first.nbytes) - 1))]
        out, inputs = weight.shape
        made = [PackedLinear.from_stored(each, in_features=inputs, out_features=out).eval() for each in stored]
        for layer in made:
            layer(x)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return [lambda layer=layer: layer(x) for layer in made]


def sparse_kernels(
    weight: Tensor, mask: Tensor, zeros: Zeros, x: Tensor, dtype: str, count: Callable[[int], int], threads: int
) -> dict[str, Any]:
    """Every kernel that can run this weight: name to calls, or to the reason why it cannot."""
    found: dict[str, Any] = {}
    for form, block in ((Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, zeros.block), (Form.LUT, 1)):
        for algorithm in _algorithms(form, len(x)):
            choice = _Choice(form, algorithm, block)
            if choice.name not in found and kernels.runs(form, _DTYPES[dtype], algorithm):
                found[choice.name] = _calls(weight, mask, x, dtype, choice, count=count, threads=threads)
    return found


@dataclass(frozen=True)
class _Choice:
    form: Form
    algorithm: Algorithm
    block: int

    @property
    def name(self) -> str:
        rows = f" {self.block}x1" if self.block > 1 else ""
        return f"{KERNEL}{self.form.name.lower()}{rows}/{self.algorithm.name.lower()}"


def _calls(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor,
    dtype: str,
    choice: _Choice,
    *,
    count: Callable[[int], int],
    threads: int,
) -> list[Call] | str:
    try:
        first = _stored(weight, mask, dtype, choice.form, choice.block)
        stored = [first, *(_again(first) for _ in range(count(first.nbytes) - 1))]
        return [Kernel(each, choice.algorithm, _activations(x), threads).call() for each in stored]
    except (RuntimeError, ValueError) as error:
        return str(error)


def packed(module: nn.Module, example: Any, dtype: str, threads: int) -> tuple[nn.Module, PackReport]:
    """`rarefy.pack` on a copy of the module, with values of that dtype: the packed module and the report."""
    model = copy.deepcopy(module).eval()
    return model, packed_in_place(model, example, dtype, threads)


def packed_in_place(model: nn.Module, example: Any, dtype: str, threads: int) -> PackReport:
    """`rarefy.pack` with values of that dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries' OpenMP in this process: peers are here on purpose
        return pack(
            model, example=example, threads=threads, dtype=torch.bfloat16 if dtype == "bf16" else None,
            quantize="int8" if dtype == "int8" else None,
        )  # fmt: skip


class _Many(nn.Module):
    """Copies of one layer, so that pack sees how much memory there is to read before a weight comes again."""

    def __init__(self, weight: Tensor, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(count):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(x)
        return y


def pack_layer(
    weight: Tensor, x: Tensor, dtype: str, nbytes: int, count: int, threads: int
) -> tuple[dict[str, Any], str | None, str | None]:
    """What `rarefy.pack` makes of `nn.Linear` with this weight: calls of `count` copies (or why there are none), the
    choice, and the candidate that it runs at this number of tokens.

    nbytes: of the packed weight. Where several copies are wanted, as many are packed together as do not fit the caches,
    for the choice depends on that; the others are copies of those."""
    together = min(count, max(1, -(-last_level_cache() * 3 // 4 // max(1, nbytes)))) if count > 1 else 1
    model = _Many(weight, together).eval()
    try:
        report = packed_in_place(model, x, dtype, threads)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {LAYER: str(error)}, None, None
    layers = [*model.layers, *(copy.deepcopy(model.layers[0]) for _ in range(count - together))]
    choice = "reverted to torch" if report.reverted else report.rows[0].choice
    for layer in layers:
        layer(x)  # a copy prepares itself at its first call
    return {LAYER: [lambda layer=layer: layer(x) for layer in layers]}, choice, _chosen(layers[0], len(x), dtype)


def _chosen(layer: nn.Module, tokens: int, dtype: str) -> str:
    """The name under which the kernel that a layer runs is timed by itself."""
    table = getattr(layer, "table", None)
    way = None if table is None else table[kernels.bucket(tokens)]
    if way is None or way.algorithm == TORCH:
        return f"torch {dtype}"
    if way.form is Form.DENSE:
        return f"{DENSE}{dtype}"
    return _Choice(way.form, Algorithm(way.algorithm), way.block).name
