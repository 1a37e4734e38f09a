"""Channel: whole outputs are kept or dropped."""

from torch import Tensor

from rarefy.axes.patterns.base import Pattern, Shape
from rarefy.axes.value import value


@value
class Channel(Pattern):
    """A unit is everything that reaches one output: a row of a Linear, a filter of a convolution.

    >>> import torch
    >>> Channel().project(torch.tensor([[1., -4.], [3., -3.]]), 1)
    tensor([[False, False],
            [ True,  True]])
    """

    shorthand = "channel"

    def units(self, shape: Shape) -> int:
        return shape[0]

    def members(self, t: Tensor) -> Tensor:
        return t.reshape(len(t), -1)

    def spread(self, units: Tensor, shape: Shape) -> Tensor:
        self.check_units(units, shape)
        return units.reshape(-1, *[1] * (len(shape) - 1)).expand(tuple(shape)).contiguous()
