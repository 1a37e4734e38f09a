"""What the tests of allocations share: two networks, random ones, and the published loop taken literally."""

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st

from rarefy.axes.allocation import Layer
from rarefy.axes.pattern import Unstructured


def layers(*shapes):
    return [Layer(f"layer{i}.weight", shape, math.prod(shape), Unstructured()) for i, shape in enumerate(shapes)]


LENET = layers((300, 784), (100, 300), (10, 100))  # 266 200 weights
CNN = layers((16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64))  # 432, 4 608, 18 432, 640; together 24 112

shape = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3)),
)
networks = st.lists(shape, min_size=1, max_size=8)  # of shapes: the layers are made in the test
sparsities = st.integers(0, 999).map(lambda i: i / 1000)


def budget(its, sparsity):
    return math.floor((1 - Fraction(str(sparsity))) * sum(layer.units for layer in its) + Fraction(1, 2))


def random_scores(its, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(layer.units, generator=generator, dtype=torch.float64) for layer in its]


def counts(allocation, its, sparsity, seed=0):
    return allocation.counts(its, sparsity, random_scores(its, seed) if allocation.needs_scores else None)


def densities(allocation, its, sparsity):
    return [float(share / layer.units) for share, layer in zip(allocation.ideal(its, sparsity), its, strict=True)]


def erk_loop(its, sparsity, raws):
    """The authors' loop with the exact budget: one pass per largest raw value."""
    dense = set()
    while len(dense) < len(its):
        rhs = budget(its, sparsity) - sum(its[i].units for i in dense)
        eps = rhs / sum(raws[i] * its[i].units for i in range(len(its)) if i not in dense)
        largest = max(raw for i, raw in enumerate(raws) if i not in dense)
        if largest * eps <= 1:
            break
        dense |= {i for i, raw in enumerate(raws) if raw == largest}
    return [layer.units if i in dense else eps * raws[i] * layer.units for i, layer in enumerate(its)]
