"""Plans: several steps in one call, values between them; calls side by side, after a fork, on any number of threads."""

import ctypes
import os
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.runtime import kernels
from rarefy.runtime.kernels import BUCKETS, Activation, Algorithm, DType, Form, Operation, Slot, Step, Weight

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")

TOKENS = [1, 3, 8, 33, 130]


def dense(weight: Tensor) -> Weight:
    rows, cols = weight.shape
    return Weight(Form.DENSE, DType.F32, 1, 0, rows, cols, rows * cols, None, weight.data_ptr(), None, None)


def step(
    operation: Operation,
    x: int,
    y: int,
    other: int = -1,
    weight: Weight | None = None,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
) -> Step:
    weights = (ctypes.POINTER(Weight) * BUCKETS)()
    if weight is not None:
        weights = (ctypes.POINTER(Weight) * BUCKETS)(*[ctypes.pointer(weight)] * BUCKETS)
    few, many = Algorithm.FEW, Algorithm.MANY
    algorithms = (ctypes.c_int32 * BUCKETS)(few, few, many, many, many)
    return Step(
        operation, activation, x, other, y, 0, bias.data_ptr() if bias is not None else None, weights, algorithms
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class GatedMlp:
    """down(silu(gate x) * up x) + x: four steps, three values between them."""

    def __init__(self, width: int = 70, hidden: int = 190) -> None:
        self.gate, self.up, self.down = (
            normal(hidden, width),
            normal(hidden, width, seed=1),
            normal(width, hidden, seed=2),
        )
        self.bias = normal(hidden, seed=3)
        self.weights = [dense(w) for w in (self.gate, self.up, self.down)]
        gate, up, down = self.weights
        self.steps = (Step * 4)(
            step(Operation.LINEAR, 0, 2, weight=gate, bias=self.bias),
            step(Operation.LINEAR, 0, 3, weight=up),
            step(Operation.MUL, 2, 4, other=3, activation=Activation.SILU),
            step(Operation.LINEAR, 4, 1, other=0, weight=down),
        )
        self.width, self.hidden = width, hidden

    def __call__(self, x: Tensor, threads: int = 2) -> Tensor:
        y = torch.full((x.shape[0], self.width), float("nan"))
        between = [kernels.slot(None, self.hidden)] * 3
        slots = [kernels.slot(x, self.width), kernels.slot(y, self.width), *between]
        assert kernels.run(self.steps, slots, len(x), threads) == 0
        return y

    def wanted(self, x: Tensor) -> Tensor:
        x, gate, up, down = (t.double() for t in (x, self.gate, self.up, self.down))
        return (F.silu(x @ gate.T + self.bias.double()) * (x @ up.T)) @ down.T + x


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_gated_mlp_is_one_call(tokens):
    mlp = GatedMlp()
    x = normal(tokens, mlp.width, seed=4)
    wanted = mlp.wanted(x)
    torch.testing.assert_close(mlp(x).double(), wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_number_of_threads_changes_no_bit(tokens):
    mlp = GatedMlp()
    x = normal(tokens, mlp.width, seed=4)
    assert all(torch.equal(mlp(x, threads), mlp(x, 1)) for threads in (2, 3, 5))


@pytest.mark.parametrize("operation", [Operation.APPLY, Operation.ADD, Operation.MUL])
@pytest.mark.parametrize("activation", list(Activation))
def test_elementwise_steps(operation, activation):
    functions = {
        Activation.NONE: lambda v: v,
        Activation.RELU: F.relu,
        Activation.GELU: F.gelu,
        Activation.GELU_TANH: lambda v: F.gelu(v, approximate="tanh"),
        Activation.SILU: F.silu,
    }
    x, other = normal(5, 37), normal(37, 5, seed=1).T
    y = torch.empty(5, 37)
    steps = (Step * 1)(step(operation, 0, 1, other=2, activation=activation))
    assert kernels.run(steps, [kernels.slot(t, 37) for t in (x, y, other)], 5) == 0
    act = functions[activation]
    a, b = x.double(), other.double()
    wanted = {Operation.APPLY: act(a), Operation.ADD: act(a + b), Operation.MUL: act(a) * b}[operation]
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=1e-6)


def test_what_has_no_kernel_is_refused_and_leaves_the_output_alone():
    x, y = normal(2, 4), torch.zeros(2, 4)
    foreign = dense(normal(4, 4))
    slots = [kernels.slot(x, 4), kernels.slot(y, 4)]
    for field, value in {"form": 9, "dtype": DType.I4}.items():
        weight = Weight.from_buffer_copy(foreign)
        setattr(weight, field, value)
        assert kernels.run((Step * 1)(step(Operation.LINEAR, 0, 1, weight=weight)), slots, 2) != 0
    assert kernels.run((Step * 1)(step(Operation.LINEAR, 0, 1)), slots, 2) != 0
    assert not y.any()
    assert not kernels.runs(Form.DENSE, DType.I4, Algorithm.FEW)


def test_no_tokens_is_nothing_to_do():
    assert kernels.run((Step * 1)(step(Operation.APPLY, 0, 1)), [Slot(), Slot()], 0) == 0


def test_calls_from_several_threads_do_not_meet():
    mlp = GatedMlp()
    inputs = [normal(tokens, mlp.width, seed=tokens) for tokens in TOKENS]
    wanted = [mlp(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(50) if not torch.equal(mlp(inputs[i]), wanted[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_after_use_computes_the_same():
    """GNU's OpenMP loses its threads in a fork: the child runs alone instead of waiting for them."""
    mlp = GatedMlp()
    x = normal(33, mlp.width, seed=4)
    wanted = mlp(x)
    child = os.fork()
    if child == 0:  # no pytest, no torch threads: an exit code is all that comes back
        os._exit(0 if torch.equal(mlp(x), wanted) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
