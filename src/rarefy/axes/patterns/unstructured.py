"""Unstructured: any weight may be zero."""

from rarefy.axes.patterns.base import WeightPattern
from rarefy.axes.value import value


@value
class Unstructured(WeightPattern):
    """Any weight may be zero.

    >>> import torch
    >>> Unstructured().project(torch.tensor([[1., -4.], [3., -2.]]), 2)
    tensor([[False,  True],
            [ True, False]])
    """

    elementwise = True
    shorthand = "unstructured"
