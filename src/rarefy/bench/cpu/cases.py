"""Which matrices, batches and zeros are compared."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rarefy.axes import parse_pattern

__all__ = ["DTYPES", "Cell", "Zeros", "cells", "make_weight", "parse_shape"]

DTYPES = ("fp32", "bf16", "int8")
Regime = Literal["hot", "cold"]

SHAPES = ((512, 512), (1024, 1024), (768, 3072), (3072, 768), (4096, 4096), (11008, 4096))  # out, in
HELD_OUT = ((1000, 1730), (2304, 777), (1536, 6144), (5120, 1280))  # nobody tunes on these
BATCHES = (1, 2, 4, 8, 32, 128, 512)
HELD_OUT_BATCHES = (1, 3, 5, 13, 50, 200)
_MAIN = ((1024, 1024), (4096, 4096))  # these have all zeros; the others those that people ask for


@dataclass(frozen=True)
class Zeros:
    """Where the zeros lie and how many: unstructured, 2:4, or blocks of 4 rows by 1 column.

    >>> str(Zeros("unstructured", 0.9)), str(Zeros("4x1", 0.9)), str(Zeros("2:4", 0.5))
    ('90 %', '4x1 90 %', '2:4')
    """

    pattern: str
    sparsity: float

    def __str__(self) -> str:
        share = f"{100 * self.sparsity:g} %"
        return {"unstructured": share, "2:4": "2:4"}.get(self.pattern, f"{self.pattern} {share}")

    @property
    def block(self) -> int:
        """Rows of a unit."""
        return 4 if self.pattern == "4x1" else 1


@dataclass(frozen=True)
class Cell:
    """A product y = x Wᵀ, W [out, in], with one x, dtype of values and regime; `zeros` are compared one by one."""

    out: int
    inputs: int
    batch: int
    dtype: str
    regime: Regime
    zeros: tuple[Zeros, ...]
    held_out: bool = False

    @property
    def name(self) -> str:
        """The shape as people write it."""
        return f"{self.out}x{self.inputs}"

    def __str__(self) -> str:
        return f"{self.name} batch {self.batch} {self.dtype} {self.regime}"


ALL_ZEROS = (
    *(Zeros("unstructured", s) for s in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)), Zeros("2:4", 0.5),
    *(Zeros("4x1", s) for s in (0.5, 0.8, 0.9, 0.95)),
)  # fmt: skip
SOME_ZEROS = (*(Zeros("unstructured", s) for s in (0.5, 0.8, 0.9, 0.95)), Zeros("4x1", 0.9))
QUICK_ZEROS = (Zeros("unstructured", 0.5), Zeros("unstructured", 0.9), Zeros("4x1", 0.9))


def parse_shape(text: str) -> tuple[int, int]:
    """ "out x in", as in 768x3072.

    >>> parse_shape("768x3072")
    (768, 3072)
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"a shape is written out x in, as in 768x3072, not {text!r}")
    return int(parts[0]), int(parts[1])


def cells(
    *,
    quick: bool = False,
    shapes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = DTYPES,
) -> list[Cell]:
    """The cells to measure, small before large. shapes, batches, dtypes: only these; empty for all there are."""
    found = [cell for cell in _all(quick) if cell.dtype in dtypes]
    if shapes:
        found = [cell for cell in found if (cell.out, cell.inputs) in shapes]
    if batches:
        found = [cell for cell in found if cell.batch in batches]
    return found


def _all(quick: bool) -> Iterator[Cell]:
    if quick:
        for shape in _MAIN:
            yield from _of_shape(shape, (1, 32, 128), QUICK_ZEROS, held_out=False)
        yield from _of_shape(HELD_OUT[0], (1, 13), QUICK_ZEROS[1:2], held_out=True)
        return
    for shape in sorted(SHAPES, key=math.prod):
        yield from _of_shape(shape, BATCHES, ALL_ZEROS if shape in _MAIN else SOME_ZEROS, held_out=False)
    for shape in sorted(HELD_OUT, key=math.prod):
        yield from _of_shape(shape, HELD_OUT_BATCHES, SOME_ZEROS, held_out=True)


def _of_shape(
    shape: tuple[int, int], batches: Sequence[int], zeros: tuple[Zeros, ...], *, held_out: bool
) -> Iterator[Cell]:
    for batch in batches:
        for dtype in DTYPES:
            # Cold matters where reading weights is what takes the time.
            regimes: tuple[Regime, ...] = ("hot", "cold") if batch == 1 else ("hot",)
            for regime in regimes:
                yield Cell(*shape, batch, dtype, regime, zeros, held_out)


def make_weight(out: int, inputs: int, zeros: Zeros, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random weight [out, inputs] in fp32 with those zeros, and its mask (bool).

    Values have variance 1 / kept inputs.

    >>> w, mask = make_weight(8, 16, Zeros("4x1", 0.75), torch.Generator().manual_seed(0))
    >>> int(mask.sum()), bool((w[~mask] == 0).all())
    (32, True)
    """
    pattern = parse_pattern(zeros.pattern)
    shape = (out, inputs)
    scores = torch.rand(shape, generator=generator)
    mask = pattern.project(scores, pattern.asked(shape, zeros.sparsity))
    weight = torch.randn(shape, generator=generator) / math.sqrt(max(1.0, inputs * (1 - zeros.sparsity)))
    return weight.masked_fill_(~mask, 0), mask
