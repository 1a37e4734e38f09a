"""The one verb: what it takes, and that whatever it refuses leaves the model as it was, to the bit."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from laws.training import OPTIMIZERS, batch, loss_of, model_of
from rarefy import Cubic, Method
from rarefy.axes import value
from tiny import picture

unchecked = inspect.unwrap(rarefy.sparsify)  # the types of arguments are checked in tests only


def refused(act: Callable[[nn.Module], Any], kind: type[Exception], says: str, model: nn.Module | None = None) -> None:
    model = model_of() if model is None else model
    before = picture(model)
    with pytest.raises(kind, match=says):
        act(model)
    assert picture(model) == before
    rarefy.sparsify(model, rarefy.Magnitude(0.5), optimizer=OPTIMIZERS["SGD"](model))  # nothing is in the way


# -- refused before anything is touched ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind", "says"),
    [
        (rarefy.IMP(0.5), TypeError, r"call method.run\(model, train\)"),
        (rarefy.RigL, TypeError, "is no method value"),
        ("RigL", TypeError, "is no method value"),
    ],
)
def test_what_is_no_method(method: Any, kind: type[Exception], says: str):
    refused(lambda model: unchecked(model, method), kind, says)


@pytest.mark.parametrize("method", [rarefy.RigL(0.75), rarefy.SET(0.75), rarefy.GMP(0.75), rarefy.TopKAST(0.75)])
def test_a_schedule_without_steps(method: Method):
    """The optimizer is there, the length of the run is not: raised before the masks are chosen."""
    refused(lambda m: rarefy.sparsify(m, method, optimizer=OPTIMIZERS["SGD"](m)), ValueError, "needs steps=")


@pytest.mark.parametrize("steps", [-1, True])
def test_steps_that_are_no_count(steps: Any):
    for optimizer in (True, False):

        def act(model: nn.Module, optimizer: bool = optimizer) -> None:
            given = OPTIMIZERS["SGD"](model) if optimizer else None
            rarefy.sparsify(model, rarefy.RigL(0.75), optimizer=given, steps=steps)

        refused(act, ValueError, "the number of optimizer steps of the whole run")


@pytest.mark.parametrize(
    ("optimizer", "kind", "says"),
    [
        (lambda model: OPTIMIZERS["SGD"](model_of()), ValueError, "no given optimizer holds"),
        (lambda model: torch.optim.SGD([model[0].weight]), ValueError, "no given optimizer holds '3.weight'"),
        (lambda model: torch.optim.SparseAdam(list(model.parameters())), ValueError, "SparseAdam"),
        (lambda model: [], ValueError, "holds no optimizer"),
        (lambda model: model, TypeError, "is no torch.optim.Optimizer"),
    ],
)
def test_unfit_optimizers(optimizer: Callable[[Any], Any], kind: type[Exception], says: str):
    for method in (rarefy.Magnitude(0.5), rarefy.RigL(0.5), rarefy.SRSTE()):

        def act(model: nn.Module, method: Method = method) -> None:
            rarefy.sparsify(model, method, optimizer=optimizer(model), steps=9)

        refused(act, kind, says)


def test_a_schedule_that_cannot_be():
    """Found out before the masks are chosen, not at the step where it would act."""

    @value
    class Never(Method):
        needs = frozenset({"optimizer"})

        def begin(self, s: rarefy.Sparsity) -> None:
            for site in s.sites:
                s.keep(site, torch.zeros_like(site.mask))

        def wants_dense_gradient(self, step: int, steps: int | None) -> bool:
            return Cubic(start=0.5).due(step, steps)

    refused(lambda m: rarefy.sparsify(m, Never(), optimizer=OPTIMIZERS["SGD"](m)), ValueError, "which are not known")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad: float):
    def act(model: nn.Module) -> None:
        rarefy.sparsify(model, rarefy.Random(0.5))

    model = model_of()
    with torch.no_grad():
        model[3].weight[0, 0] = bad
    before = picture(model)
    with pytest.raises(ValueError, match=r"weights of '3\.weight' hold"):
        act(model)
    assert picture(model) == before


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("8x16", r"'0.weight': 8x16 is larger than the 16x12 matrix.*\(skip='0.weight'\)"),
        ("7:16", "has no whole group"),
    ],
)
def test_patterns_that_do_not_fit(pattern: str, says: str):
    refused(lambda m: rarefy.sparsify(m, rarefy.Magnitude(0.5, pattern=pattern), only=["0", "5"]), ValueError, says)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"only": "decoder"}, "only='decoder' matches no weight"),
        ({"skip": "decoder"}, "skip='decoder' matches no weight"),
        ({"only": "0", "skip": "0"}, "no site"),
        ({"skip": nn.Linear}, "no site"),
    ],
)
def test_selections_that_leave_nothing(chosen: dict[str, Any], says: str):
    refused(lambda m: rarefy.sparsify(m, rarefy.Magnitude(0.5), **chosen), ValueError, says)


@pytest.mark.parametrize("method", [rarefy.SNIP(0.5), rarefy.GraSP(0.5), rarefy.RandomSearch(0.5), rarefy.SynFlow(0.5)])
def test_missing_data_or_loss(method: Method):
    refused(lambda m: rarefy.sparsify(m, method, loss=loss_of), ValueError, "needs data=, an iterable of batches")
    if "loss" in method.needs:
        refused(lambda m: rarefy.sparsify(m, method, data=[batch(0)]), ValueError, "needs loss=, a callable")


def test_nothing_is_kept_of_data_and_loss():
    handle = rarefy.sparsify(model_of(), rarefy.SNIP(0.5), data=[batch(0)], loss=loss_of)
    assert handle.data is None
    assert handle.loss is None


# -- what it takes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "sites"),
    [
        ({}, ["0.weight", "3.weight", "5.weight"]),
        ({"only": "3"}, ["3.weight"]),
        ({"only": ["5.weight", "0"]}, ["0.weight", "5.weight"]),
        ({"skip": "[35].*"}, ["0.weight"]),
        ({"skip": lambda name, module: module.out_features == 4}, ["0.weight", "3.weight"]),
    ],
)
def test_sites_are_chosen_by_name_glob_class_or_predicate(chosen: dict[str, Any], sites: list[str]):
    model = model_of()
    dense = copy.deepcopy(model)
    handle = rarefy.sparsify(model, rarefy.Magnitude(0.75, allocation="uniform"), **chosen)
    assert list(handle.masks) == sites
    for name, p in model.named_parameters():
        expected = dense.get_parameter(name) * (handle.masks[name] if name in sites else 1)
        assert torch.equal(p, expected)


def test_a_tensor_a_tuple_and_a_mapping_as_batch():
    """SynFlow reads no values, so that the three must choose the same masks."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    x = batch(0)[0]
    masks = [
        rarefy.sparsify(Net(), rarefy.SynFlow(0.75, rounds=3), data=[given]).masks for given in (x, (x,), {"x": x})
    ]
    for name, mask in masks[0].items():
        assert all(torch.equal(mask, other[name]) for other in masks[1:])


def test_the_seed_decides_and_global_ones_are_left_alone():
    before = torch.get_rng_state()
    masks = [rarefy.sparsify(model_of(), rarefy.Random(0.75), seed=seed).masks for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])
        assert not torch.equal(mask, masks[2][name])
        assert mask.sum() == masks[2][name].sum()


def test_without_an_optimizer_nothing_is_watched():
    model = model_of()
    handle = rarefy.sparsify(model, rarefy.RigL(0.75), steps=50)
    assert not handle.attached
    assert handle.steps == 50
    assert handle.attach(OPTIMIZERS["SGD"](model)).steps == 50


def test_a_second_choice_follows_the_first():
    """One-shot handles are not attached, so the model may be made sparser."""
    model = model_of()
    first = rarefy.sparsify(model, rarefy.Magnitude(0.5)).masks
    second = rarefy.sparsify(model, rarefy.Magnitude(0.75)).masks
    assert all(bool((first[name] | ~mask).all()) for name, mask in second.items())
