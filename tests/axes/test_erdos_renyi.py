import math
from fractions import Fraction

from hypothesis import given

from layer_lists import CNN, densities, erk_loop, layers, networks, sparsities
from rarefy.axes.allocation import ErdosRenyi, ErdosRenyiKernel, ErdosRenyiKernelPlus


def test_a_power_below_one_evens_out():
    assert ErdosRenyiKernel(power=0.0).counts(CNN, 0.9) == [43, 461, 1843, 64]
    soft = densities(ErdosRenyiKernel(power=0.5), CNN, 0.9)
    hard = densities(ErdosRenyiKernel(), CNN, 0.9)
    assert soft[0] < hard[0]
    assert soft[2] > hard[2]


def test_the_plus_fixes_the_last_matrix_only():
    half = ErdosRenyiKernelPlus(last=0.5)
    assert half.counts(CNN, 0.9)[-1] == 320
    assert sum(half.counts(CNN, 0.9)) == 2411
    assert half.counts(CNN[:3], 0.9) == ErdosRenyiKernel().counts(CNN[:3], 0.9)  # ends in a convolution


@given(networks, sparsities)
def test_erdos_renyi_follows_the_authors_loop(shapes, sparsity):
    its = layers(*shapes)
    for allocation, dims in ((ErdosRenyi(), slice(2)), (ErdosRenyiKernel(), slice(None))):
        raws = [Fraction(sum(layer.shape[dims]), math.prod(layer.shape[dims])) for layer in its]
        assert allocation.ideal(its, sparsity) == erk_loop(its, sparsity, raws)
