"""The packed layers: `PackedLinear`, `PackedConv2d`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rarefy.runtime import conv, kernels, ops
from rarefy.runtime.engine import Engine, Runner, runner
from rarefy.runtime.forms import Stored
from rarefy.runtime.kernels import Form
from rarefy.runtime.packed import Packed
from rarefy.runtime.ways import TORCH, Table, plain_table

__all__ = ["KINDS", "Packed", "PackedConv2d", "PackedLinear", "from_description", "geometry_of"]

_is_compiling = torch.compiler.is_compiling


class PackedLinear(Packed):
    """y = x Wᵀ + b, on the kernels of the ways in `table`, one for each bucket of tokens.

    >>> from rarefy.runtime.forms import encode
    >>> layer = PackedLinear.from_stored(encode(torch.eye(3)), in_features=3, out_features=3)
    >>> layer(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[1., 2., 3.]])
    """

    plain = nn.Linear
    in_features: int
    out_features: int
    table: Table | None
    _algorithms: list[int]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features], in the dtype of x."""
        if not _is_compiling() and ops.direct(x):
            return (self._ready or self._prepare())(x)
        return ops.linear(
            x, self.packed_weight, self._bias_float(), self.out_features, self.in_features, self._algorithms
        )

    def choose(self, table: Table) -> None:
        """Run by these ways from now on, one for each bucket."""
        self.table, self._ready = table, None
        self._algorithms = _for_operator(table, *self._form)

    def engine(self) -> Engine | None:
        """What runs all buckets by kernels, for a plan; None where some are torch's."""
        found = self._ready or self._prepare()
        return found if isinstance(found, Engine) else None

    def describe(self) -> dict[str, Any]:
        """See `Packed.describe`."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {"kind": "Linear"} | sizes | super().describe()

    def extra_repr(self) -> str:
        said = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.packed_bias is not None}"
        return f"{said}, {super().extra_repr()}"

    def _prepare(self) -> Runner:
        made = runner(self.stored, self.table, self._bias_float())[0]
        self._ready = made
        return made

    def _choose_plainly(self, stored: Stored) -> None:
        self.table = plain_table(Form(int(stored.form)), stored.dtype, stored.block)
        self._algorithms = _for_operator(self.table, *self._form)

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features


def _for_operator(table: Table | None, form: int, dtype: int, block: int) -> list[int]:
    """The operator knows the stored form only: where a second form would run, the usual way of the stored one does."""
    if table is None:
        return [TORCH] * kernels.BUCKETS
    own = plain_table(Form(form), kernels.DType(dtype), block) or table
    pairs = zip(table, own, strict=True)
    return [int((way if (way.form, way.block) == (form, block) else usual).algorithm) for way, usual in pairs]


class PackedConv2d(Packed):
    """A convolution with one group, no dilation and zero padding. `way`: "conv", "product many", "product expand"
    (1×1), "torch"."""

    plain = nn.Conv2d
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    way: str

    def forward(self, x: Tensor) -> Tensor:
        """x [n, channels, height, width] or [channels, height, width] → the same with out_channels, contiguous."""
        if not _is_compiling() and ops.direct(x):
            return (self._ready or self._prepare())(x)
        return ops.conv2d(x, self.packed_weight, self._bias_float(), self.geometry, self.way)

    @property
    def geometry(self) -> conv.Geometry:
        """Its sizes."""
        return geometry_of(self)

    def choose(self, way: str) -> None:
        """Run by this way from now on."""
        self.way, self._ready = way, None

    def describe(self) -> dict[str, Any]:
        """See `Packed.describe`."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        sizes = {name: getattr(self, name) for name in names}
        listed: dict[str, Any] = {k: list(cast(Any, v)) if isinstance(v, tuple) else v for k, v in sizes.items()}
        return {"kind": "Conv2d"} | listed | super().describe()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {super().extra_repr()}"

    def _prepare(self) -> Runner:
        made = conv.runner(self.stored, self.geometry, self._bias_float(), self.way)
        self._ready = made
        return made

    def _choose_plainly(self, stored: Stored) -> None:
        self.way = conv.plain_way(self.geometry, Form(int(stored.form)), stored.block, stored.dtype)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)


def geometry_of(module: Any) -> conv.Geometry:
    """The sizes of a convolution, packed or dense."""
    return conv.Geometry(module.out_channels, module.in_channels, *module.kernel_size, *module.stride, *module.padding)


KINDS: dict[str, type[Packed]] = {"Linear": PackedLinear, "Conv2d": PackedConv2d}
"""By what `describe` calls them."""


def from_description(stored: Stored, *, bias: Tensor | None = None, **description: Any) -> Packed:
    """A packed layer of the kind that its description names. Raises ValueError for one that is not known."""
    kind = KINDS.get(str(description.get("kind")))
    if kind is None:
        raise ValueError(f"no packed layer is called {description.get('kind')!r}; there are {', '.join(KINDS)}")
    return kind.from_stored(stored, bias=bias, **description)
