"""`DirectLinear`: a dense layer on our own dense kernels, reading its Parameter where it lies: nothing is copied."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.runtime import kernels, ops
from rarefy.runtime.engine import KINDS, Engine
from rarefy.runtime.kernels import DType, Form, Weight
from rarefy.runtime.ways import TORCH, Table

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled


class DirectLinear(nn.Linear):
    """nn.Linear, its product by our kernels in the buckets where they were faster. Tied weights stay tied.

    Training, compiled and traced calls, and activations of another dtype than the weight's run as in nn.Linear.
    """

    table: Table
    _native: tuple[bool, ...]
    _held: tuple[Any, ...] | None = None
    _engine: Engine | None = None

    @classmethod
    def convert(cls, module: nn.Linear, table: Table) -> DirectLinear:
        """Turn a dense layer into one of this class, in place."""
        module.__class__ = cls
        direct = cast(DirectLinear, module)
        direct.table = table
        direct._native = tuple(way.algorithm != TORCH for way in table)
        return direct

    def restore(self) -> nn.Linear:
        """Turn it back, in place."""
        for name in ("table", "_native", "_held", "_engine"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear."""
        if not _is_compiling() and ops.direct(input) and self._native[kernels.bucket(_tokens(input))]:
            engine = self.engine()
            if engine is not None and input.dtype is self._held[1]:  # pyright: ignore[reportOptionalSubscript]
                return engine(input)
        return functional.linear(input, self.weight, self.bias)

    def engine(self) -> Engine | None:
        """The engine over the parameters as they lie now; None where they train or are not plain CPU tensors."""
        weight: Any = self._parameters["weight"]
        bias: Any = self._parameters["bias"]
        if weight.requires_grad and _is_grad_enabled():
            return None
        state = (weight.data_ptr(), weight.dtype, None if bias is None else (bias.data_ptr(), _version(bias)))
        if state != self._held:
            self._engine = engine_over(weight, bias, self.table)
            self._held = state
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds addresses."""
        state = self.__dict__.copy()
        state.pop("_held", None)
        state.pop("_engine", None)
        return state


def engine_over(weight: Tensor, bias: Tensor | None, table: Table) -> Engine | None:
    """An engine on the memory of a dense weight [rows, cols]; buckets of torch's are given to some kernel.

    None where no kernel can read it: another dtype, other strides, another device, no kernels.
    """
    dtype = KINDS.get(weight.dtype)
    usable = dtype is not None and weight.is_cpu and weight.is_contiguous() and kernels.available()
    if not usable or (bias is not None and not bias.is_cpu):
        return None
    own = next((way for way in table if way.algorithm != TORCH), None)
    if own is None:
        return None
    algorithms = [own.algorithm if way.algorithm == TORCH else way.algorithm for way in table]
    exact = None if bias is None else bias.detach().to(torch.float32).contiguous()
    described = dense_weight(weight, cast(DType, dtype))
    return Engine([described] * kernels.BUCKETS, algorithms, exact, (weight, exact))


def dense_weight(weight: Tensor, dtype: DType) -> Weight:
    """What kernels take for a dense weight, contiguous; the caller keeps it alive."""
    rows, cols = weight.shape
    return Weight(Form.DENSE, dtype, 1, 0, rows, cols, rows * cols, None, weight.data_ptr(), None, None)


def _tokens(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1]) if x.ndim else 1


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
