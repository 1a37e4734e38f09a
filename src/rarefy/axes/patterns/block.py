"""Block: tiles of the weight matrix are kept or dropped whole."""

import re
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from rarefy.axes.patterns.base import Pattern, Shape
from rarefy.axes.value import value


@value
class Block(Pattern):
    """A unit is a tile of rows x columns of the (out, in·kernel) matrix; tiles in row order.

    Where the matrix is no multiple of the tile, the tiles at its right and lower edge are smaller. They are units like
    any other: their score is the mean over the weights they have, and a budget counts them as one.
    Raises ValueError for a weight that is smaller than one tile.

    >>> import torch
    >>> Block(2, 1).project(torch.tensor([[1., 4.], [3., 1.], [2., 9.]]), 2).int()
    tensor([[0, 1],
            [0, 1],
            [0, 1]], dtype=torch.int32)
    """

    rows: Annotated[int, Field(ge=1)]
    columns: Annotated[int, Field(ge=1)]
    shorthand = "RxC such as 4x1"

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @classmethod
    def from_text(cls, text: str) -> "Block | None":
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        return cls(int(found[1]), int(found[2])) if found else None

    def units(self, shape: Shape) -> int:
        height, width = _matrix(shape)
        return -(-height // self.rows) * -(-width // self.columns)

    def members(self, t: Tensor) -> Tensor:
        matrix = t.reshape(_matrix(t.shape))
        height, width = matrix.shape
        padded = pad(matrix, (0, -width % self.columns, 0, -height % self.rows))
        tiles = padded.reshape(len(padded) // self.rows, self.rows, -1, self.columns)
        return tiles.transpose(1, 2).reshape(-1, self.rows * self.columns)

    def sizes(self, shape: Shape) -> Tensor | int:
        height, width = _matrix(shape)
        return torch.outer(_extents(height, self.rows), _extents(width, self.columns)).flatten()

    def spread(self, units: Tensor, shape: Shape) -> Tensor:
        self.check_units(units, shape)
        height, width = _matrix(shape)
        tiles = units.reshape(-(-height // self.rows), 1, -(-width // self.columns), 1)
        padded = tiles.expand(-1, self.rows, -1, self.columns).flatten(2).flatten(0, 1)
        return padded[:height, :width].contiguous().reshape(tuple(shape))

    def fits(self, shape: Shape) -> str | None:
        if (reason := super().fits(shape)) or len(shape) < 2:
            return reason or f"{self} needs a matrix, got shape {tuple(shape)}; use 'unstructured' or skip the layer"
        height, width = _matrix(shape)
        if self.rows <= height and self.columns <= width:
            return None
        return (
            f"{self} is larger than the {height}x{width} matrix of a weight of shape {tuple(shape)}; use tiles of at "
            f"most {min(self.rows, height)}x{min(self.columns, width)} or skip the layer"
        )


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()


def _extents(length: int, tile: int) -> Tensor:
    """Lengths of the tiles along one side: all full but perhaps the last."""
    return (length - torch.arange(0, length, tile)).clamp(max=tile)
