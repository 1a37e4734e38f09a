import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
from rarefy.core.undisturbed import undisturbed


class Restless(nn.Module):
    """Writes to one buffer, replaces another, draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.last = torch.ones(2, 3)
        return F.dropout(self.drop(self.layer(x)), 0.5)


def test_all_is_put_back():
    model = Restless()
    before = tiny.picture(model)
    with undisturbed(model):
        model.layer.weight.requires_grad_(False)
        model(torch.ones(3, 4))
        model.eval()
    assert tiny.picture(model) == before


def test_after_an_error_too():
    model = tiny.cnn()
    before = tiny.picture(model)

    def fails() -> None:
        with undisturbed(model):
            model(torch.ones(2, 3, 4, 4, dtype=torch.float64))
            model.eval()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert tiny.picture(model) == before


def test_dropout_layers_are_off_and_the_rest_follows_the_seed():
    model = Restless()
    x = torch.ones(3, 4)

    def output(seed: int) -> torch.Tensor:
        with undisturbed(model, seed):
            assert model.training
            assert not model.drop.training
            return model(x)

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))


def test_norms_run_in_the_mode_of_the_model():
    model = nn.BatchNorm1d(3)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with undisturbed(model):
        assert model(x).mean().abs() < 1e-6  # statistics of the batch
    model.eval()
    with undisturbed(model):
        assert torch.allclose(model(x), x, atol=1e-4)


def test_compiled_parts_run_eagerly():
    """Second derivatives cannot go through a compiled graph."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    compiled = torch.compile(model, backend="aot_eager")
    with undisturbed(compiled):
        (g,) = torch.autograd.grad(compiled(torch.ones(2, 3)).sum(), [model[0].weight], create_graph=True)
        torch.autograd.grad(g.square().sum(), [model[0].weight])
