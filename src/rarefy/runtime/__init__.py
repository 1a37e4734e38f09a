"""Execution: stored forms of a weight, the kernels that multiply them, and the choice between those by measurement.

forms/    a weight's kept entries as bytes     find     layers that can be packed, shapes that an example brings
kernels   the C interface                      cost     what a product should take      measure   what it takes
ways      a form and an algorithm              choose   the fastest for a layer         cache     what is known
engine    the shortest way to a kernel         pack     `pack` and `unpack`             report    what was chosen
layers    packed layers; conv, direct, ops     plan     several layers in one call      program   its steps
"""

from rarefy.runtime.layers import PackedConv2d, PackedLinear
from rarefy.runtime.pack import pack, unpack
from rarefy.runtime.packed import Packed
from rarefy.runtime.report import PackReport

__all__ = ["PackReport", "Packed", "PackedConv2d", "PackedLinear", "pack", "unpack"]
