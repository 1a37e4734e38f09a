"""Activations and the steps without a weight, against float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from kernels.reference import LAYOUTS, activated, laid_out, random_input
from rarefy.runtime import kernels
from rarefy.runtime.kernels import Activation, DType, Operation, Step


def apply(
    operation: Operation,
    activation: Activation,
    x: torch.Tensor,
    other: torch.Tensor | None = None,
    *,
    layout: str = "tokens",
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> torch.Tensor:
    y = laid_out(torch.full(x.shape, math.nan, dtype=dtype), layout)
    kinds = {torch.float32: DType.F32, torch.bfloat16: DType.BF16}
    slots = [kernels.slot(t, t.shape[1], kinds[t.dtype]) for t in (x, y, other) if t is not None]
    step = Step()
    step.operation, step.activation = operation, activation
    step.x, step.y, step.other = 0, 1, -1 if other is None else 2
    assert kernels.run((Step * 1)(step), slots, len(x), threads) == 0
    return y


def exact(values: np.ndarray, activation: Activation) -> np.ndarray:
    """In float64, without the cancellation that torch's formulas have where an activation fades out."""
    x = torch.from_numpy(values)
    if activation == Activation.GELU:
        return (x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5))).numpy()
    if activation == Activation.GELU_TANH:
        return (x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))).numpy()
    return activated(values, activation)


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name)
def test_activations_are_accurate(isa, activation):
    """To 5e-7 of the value up to where it has fallen to 1e-6 of x, and to 3e-7 of x everywhere."""
    magnitudes = np.geomspace(1e-30, 1e30, 3001)
    x = np.concatenate([np.linspace(-20, 20, 20001), magnitudes, -magnitudes, [0.0]]).astype(np.float32)
    y = apply(Operation.APPLY, activation, torch.from_numpy(x)[None])[0].double().numpy()
    want = exact(x.astype(np.float64), activation)
    error = np.abs(y - want)
    assert (error <= 3e-7 * np.abs(x)).all()
    well = np.abs(want) > 1e-6 * np.abs(x)
    share = 4e-6 if activation == Activation.GELU_TANH else 5e-7  # its argument has three roundings
    assert (error[well] <= share * np.abs(want[well])).all()


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name)
def test_what_is_not_finite_stays_so(isa, activation):
    x = np.array([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, -0.0] * 3, np.float32)
    y = apply(Operation.APPLY, activation, torch.from_numpy(x)[None])[0].double().numpy()
    want = exact(x.astype(np.float64), activation)
    assert np.array_equal(np.isnan(y), np.isnan(want))
    assert np.allclose(y, want, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("operation", [Operation.APPLY, Operation.ADD, Operation.MUL], ids=lambda o: o.name)
def test_steps_without_a_weight(isa, operation):
    for tokens, features, dtype in ((1, 1, 0), (3, 50, 0), (20, 33, 1), (17, 16, 1), (1, 40, 0)):
        kind = (torch.float32, torch.bfloat16)[dtype]
        x, other = random_input(tokens, features, kind), random_input(tokens, features, kind, seed=1)
        for of_x, of_other, of_y in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS):
            second = None if operation == Operation.APPLY else laid_out(other, of_other)
            y = apply(operation, Activation.SILU, laid_out(x, of_x), second, layout=of_y, dtype=kind)
            a, b = x.double().numpy(), other.double().numpy()
            before = a + b if operation == Operation.ADD else a
            want = activated(before, Activation.SILU) * (b if operation == Operation.MUL else 1)
            bound = 1e-6 * (np.abs(a) + np.abs(b) + np.abs(want)) + (np.abs(want) * 2.0**-8 if dtype else 0)
            assert (np.abs(y.double().numpy() - want) <= bound).all()


def test_a_value_between_two_steps(isa):
    """A residual around an activation: x + gelu(x), the activation in a slot that the call makes itself."""
    for tokens in (3, 40):
        x, y = random_input(tokens, 70), torch.empty(tokens, 70)
        steps = (Step * 2)()
        steps[0].operation, steps[0].activation = Operation.APPLY, Activation.GELU
        steps[0].x, steps[0].other, steps[0].y = 0, -1, 1
        steps[1].operation, steps[1].x, steps[1].other, steps[1].y = Operation.ADD, 1, 0, 2
        slots = [kernels.slot(x, 70), kernels.slot(None, 70), kernels.slot(y, 70)]
        assert kernels.run(steps, slots, tokens, 1) == 0
        want = activated(x.double().numpy(), Activation.GELU) + x.double().numpy()
        assert np.allclose(y.numpy(), want, rtol=1e-6, atol=1e-6)
