import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from rarefy.runtime import plan
from rarefy.runtime.direct import DirectLinear
from rarefy.runtime.kernels import Activation, Algorithm, Form, Operation
from rarefy.runtime.program import Line, Program, fused
from rarefy.runtime.ways import TORCH, Way
from runtime.nets import GatedMLP, have_kernels, mlp, packed, thin
from runtime.test_layers import inputs

pytestmark = pytest.mark.skipif(not have_kernels(), reason="plans run on compiled kernels")


def alone(model, x):
    """Without plans."""
    plan.remove(model)
    with torch.no_grad():
        y = model(x)
    plan.install(model)
    return y


@pytest.fixture
def calls(monkeypatch):
    """How many programs ran as one call."""
    counted = []
    run = Program.run

    def counting(self, *given):
        result = run(self, *given)
        counted.append(result is not None)
        return result

    monkeypatch.setattr(Program, "run", counting)
    return counted


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(24, 40), nn.Linear(40, 24), nn.Dropout(0.5)

    def forward(self, x, y):
        return functional.relu(self.drop(self.b(functional.gelu(self.a(x), approximate="tanh"))) + x) * y + x


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.act = nn.Linear(24, 40), nn.GELU()

    def forward(self, hidden):
        hidden = self.dense(hidden)
        return self.act(hidden)


@pytest.mark.parametrize("tokens", [1, 3, 9, 40, 130])
@pytest.mark.parametrize(
    ("make", "features", "programs"),
    [
        (lambda: mlp(24, 40, 32, 8), [24], 1),
        (lambda: nn.Sequential(nn.Flatten(), *mlp(24, 40, 8), nn.Softmax(-1), *mlp(8, 8), nn.SiLU()), [24], 2),
        (lambda: nn.Sequential(nn.Linear(24, 16), nn.Dropout(0.3), nn.GELU(), nn.Identity()), [24], 1),
        (GatedMLP, [24], 1),
        (lambda: GatedMLP(bias=True), [24], 1),
        (Residual, [24, 24], 1),
        (Bert, [24], 1),
        (lambda: nn.Sequential(Bert(), nn.LayerNorm(40), nn.Sequential(nn.Linear(40, 8), nn.ReLU())), [24], 2),
    ],
    ids=["chain", "parts", "passed", "gated", "gated-bias", "residual", "bert", "nested"],
)
def test_one_call_gives_what_the_modules_give(make, features, programs, tokens, calls):
    model = thin(make())
    given = [inputs(tokens, n, seed=i) for i, n in enumerate(features)]
    with torch.no_grad():
        exact = model.double()(*[x.double() for x in given]).float()
        packed(model.float())
        found = model(*given)
    assert calls == [True] * programs
    assert torch.allclose(found, exact, atol=1e-5)
    assert torch.equal(found, model(*given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_other_dtypes_run_module_by_module(dtype, calls):
    model = packed(thin(GatedMLP()))
    with torch.no_grad():
        assert model(inputs(2, 24).to(dtype)).dtype is dtype
    assert calls == [False]


def test_inputs_of_any_shape_and_stride(calls):
    model = packed(thin(GatedMLP()))
    for x in (inputs(24), inputs(2, 3, 24), inputs(24, 9).t(), inputs(4, 48)[:, ::2], inputs(0, 24)):
        with torch.no_grad():
            assert torch.allclose(model(x), alone(model, x), atol=1e-5)
    assert calls[:4:2] == [True, True]
    with pytest.raises((ValueError, RuntimeError)):
        model(inputs(3, 25))


def test_hooks_training_and_gradients_run_module_by_module(calls):
    model = packed(thin(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 8))))
    seen = []
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    model(inputs(1, 24))
    assert (calls, seen) == ([False], [1])
    handle.remove()
    model(inputs(1, 24))
    assert calls[-1]
    model.train()
    assert (model(inputs(64, 24)) != model(inputs(64, 24))).any()
    model.eval()
    x = inputs(2, 24).requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not calls[-1]
    outer = []
    model.register_forward_hook(lambda *_: outer.append(1))
    model(inputs(1, 24))
    assert calls[-1]
    assert outer == [1]
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    model(inputs(1, 24))
    everywhere.remove()
    assert not calls[-1]


def test_copies_have_plans_of_their_own(calls):
    model = packed(thin(GatedMLP()))
    x = inputs(2, 24)
    y = model(x)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for each in (twin, loaded):
        assert each.forward.__self__.module is each
        each.down.load_state_dict(packed(thin(GatedMLP(), seed=50)).down.state_dict())
        assert not torch.equal(each(x), y)
    assert torch.equal(model(x), y)
    assert all(calls)


def test_a_layer_packed_anew_is_seen(calls):
    model = packed(thin(mlp(24, 40, 8)))
    x = inputs(1, 24)
    model(x)
    other = packed(thin(mlp(24, 40, 8), seed=9))
    model.load_state_dict(other.state_dict())
    assert torch.allclose(model(x), other(x))
    assert all(calls)


def test_a_parameter_that_moves_is_seen(calls):
    model = packed(thin(mlp(24, 40, 8)))
    plan.remove(model)
    model[2].restore()
    table = (*[Way(Form.DENSE, Algorithm.FEW)] * 4, Way(Form.DENSE, TORCH))
    DirectLinear.convert(model[2].requires_grad_(False), table)
    plan.install(model)
    x = inputs(3, 24)
    for change in (lambda w: w.mul_(2), lambda w: setattr(w, "data", torch.randn(8, 40))):
        with torch.no_grad():
            change(model[2].weight)
            assert torch.allclose(model(x), alone(model, x), atol=1e-5)
    assert all(calls)
    model(inputs(200, 24))
    assert not calls[-1]  # a bucket in which torch was faster
    with torch.no_grad():
        model.half()
        model.float()
        assert torch.allclose(model(x), alone(model, x), atol=1e-5)
    assert calls[-1]


class Keeps(nn.Module):
    """Its forward leaves something on the module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(24, 24), nn.Linear(24, 24), None

    def forward(self, x):
        self.last = x
        return self.b(torch.relu(self.a(x)))


class Branches(Keeps):
    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else x


class InPlace(Keeps):
    def forward(self, x):
        return self.b(functional.relu(x, inplace=True)) + self.a(x)


class Scaled(Keeps):
    def forward(self, x):
        return self.b(self.a(x) * 2)


class Optional(Keeps):
    def forward(self, x, scale=None):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("make", [Keeps, Branches, InPlace, Scaled, Optional])
def test_what_cannot_be_one_call_runs_as_it_is(make):
    model = thin(make())
    exact = model(inputs(3, 24))
    model.last = None
    packed(model)
    assert "forward" not in model.__dict__
    assert model.last is None
    assert torch.allclose(model(inputs(3, 24)), exact, atol=1e-5)


def test_remove_leaves_nothing_behind():
    model = packed(thin(nn.Sequential(GatedMLP(), mlp(24, 8))))
    assert len(plan.installed(model)) == 1  # a chain of one layer saves nothing
    plan.remove(model)
    assert not plan.installed(model)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_fusing():
    layers = [nn.Identity() for _ in range(3)]
    linear, apply, add, mul = Operation.LINEAR, Operation.APPLY, Operation.ADD, Operation.MUL
    silu, relu = Activation.SILU, Activation.RELU
    gated = [
        Line(linear, 0, 1, layer=layers[0]), Line(apply, 1, 2, activation=silu), Line(linear, 0, 3, layer=layers[1]),
        Line(mul, 2, 4, 3), Line(linear, 4, 5, layer=layers[2]),
    ]  # fmt: skip
    found = fused(1, gated)
    assert [(l.operation, l.x, l.other, l.y, l.activation) for l in found] == [  # noqa: E741
        (linear, 0, -1, 1, silu), (linear, 0, -1, 2, Activation.NONE), (mul, 1, 2, 3, Activation.NONE),
        (linear, 3, -1, 4, Activation.NONE),
    ]  # fmt: skip
    residual = [Line(linear, 0, 1, layer=layers[0]), Line(add, 1, 2, 0), Line(apply, 2, 3, activation=relu)]
    assert [(l.operation, l.other, l.activation) for l in fused(1, residual)] == [  # noqa: E741
        (linear, 0, Activation.NONE), (apply, -1, relu)
    ]  # fmt: skip
    twice = [Line(linear, 0, 1, layer=layers[0]), Line(apply, 1, 2, activation=relu), Line(add, 1, 3, 2)]
    assert fused(1, twice) == twice
