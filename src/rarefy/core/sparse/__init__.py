"""Truly sparse execution: weights, gradients and optimizer state exist for the non-zeros alone.

structure   where the non-zeros of a matrix lie, row by row and column by column
kernels     the three products of a training step, compiled or by torch
linear      `SparseLinear`, what an `nn.Linear` is meanwhile, and its place in autograd
gathered    the dense gradient of one step, in row chunks
site        a site whose parameter is the vector of its values
move        another structure: values, gradients and optimizer state go along
execute     what cannot run sparse, and the way in and out
"""

from rarefy.core.sparse.linear import SparseLinear, to_dense
from rarefy.core.sparse.structure import Compressed, Structure

__all__ = ["Compressed", "SparseLinear", "Structure", "to_dense"]
