"""Bad input raises an error that says what would work, and leaves the model as it was, to the bit. See `table.py`."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
import tiny
from methods import table
from methods.table import FREE, METHODS, PLAIN, ROWS, STEPS
from rarefy.core.method import Driver
from rarefy.core.sparsity import Sparsity
from rarefy.methods.one_shot.layerwise import Layerwise


def assert_refused(model: nn.Module, act: Callable[[], Any], match: str, kind: type[Exception] = ValueError) -> None:
    before = tiny.picture(model)
    with pytest.raises(kind, match=match):
        act()
    assert tiny.picture(model) == before


def attempt(name: str, model: nn.Module, data: Any, **more: Any) -> Callable[[], Any]:
    """Start the method as a user would, drivers too."""
    method = more.pop("method", None) or ROWS[name].method()
    if isinstance(method, Driver):

        def train(model: nn.Module, s: Sparsity) -> None:
            raise AssertionError("training began")

        return lambda: method.run(model, train)
    if isinstance(data, list):
        data = table.given(method, data)
    arguments: dict[str, Any] = {"optimizer": tiny.sgd(model), "steps": STEPS, "data": data, "loss": tiny.loss} | more
    return lambda: rarefy.sparsify(model, method, **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_no_numbers(name: str, value: float):
    model, data = table.mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = value
    assert_refused(model, attempt(name, model, data), r"2\.weight.*(NaN|infinite)")


@pytest.mark.parametrize("name", [n for n in PLAIN if "data" in ROWS[n].method().needs or n == "Prune"])
def test_data(name: str):
    model, _ = table.mlp()
    assert_refused(model, attempt(name, model, []), "no batch")
    assert_refused(model, attempt(name, model, iter(())), "no batch")
    assert_refused(model, attempt(name, model, None), "needs data=")
    assert_refused(model, attempt(name, model, torch.ones(3, 10)), "list of ")
    if "loss" in ROWS[name].method().needs or name == "Prune":
        assert_refused(model, attempt(name, model, tiny.batches(), loss=None), "needs loss=")
        vector = lambda model, batch: model(batch[0])  # noqa: E731
        assert_refused(model, attempt(name, model, tiny.batches(), loss=vector), "scalar")


@pytest.mark.parametrize("name", [n for n in PLAIN if "loss" in ROWS[n].method().needs or n == "Prune"])
def test_data_that_give_no_number(name: str):
    model, data = table.mlp()
    bad = [(batch[0] * math.nan, batch[1]) for batch in data]
    assert_refused(model, attempt(name, model, bad), "NaN")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
@pytest.mark.parametrize("name", [n for n in METHODS if n != "Dense"])
def test_impossible_sparsity(name: str, sparsity: float):
    with pytest.raises(ValueError, match="sparsity"):
        ROWS[name].method(sparsity=sparsity)


@pytest.mark.parametrize("name", [n for n in PLAIN if n not in {"Dense", "TopKAST", "SRSTE"}])
def test_no_sparsity(name: str):
    model, data = table.mlp()
    method = ROWS[name].method(sparsity=None)
    assert_refused(model, attempt(name, model, data, method=method), "give sparsity=")


@pytest.mark.parametrize("name", [n for n in METHODS if n != "Dense"])
def test_impossible_patterns(name: str):
    for pattern in ("5:4", "0:4", "4x0", "hexagons"):
        with pytest.raises(ValueError, match=r"must be at|unknown pattern"):
            ROWS[name].method(pattern=pattern)
    model, data = table.mlp()
    for pattern, match in (("100x100", "0.weight"), ("3:64", "no whole group")):
        if {"3:64": "2:4", "100x100": "2x2"}[pattern] not in ROWS[name].patterns:
            continue
        method = ROWS[name].method(pattern=pattern)
        assert_refused(model, attempt(name, model, data, method=method), match)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.patterns is FREE])
def test_a_pattern_with_its_own_count_is_refused_where_it_makes_no_sense(name: str):
    with pytest.raises(ValueError, match="2:4 fixes its own count"):
        ROWS[name].method(pattern="2:4")


@pytest.mark.parametrize("name", METHODS)
def test_no_site(name: str):
    model = nn.Sequential(nn.BatchNorm1d(10), nn.ReLU())
    assert_refused(model, attempt(name, model, tiny.batches()), "no site")


@pytest.mark.parametrize("name", [n for n in PLAIN if "steps" in ROWS[n].method().needs])
def test_missing_steps(name: str):
    model, data = table.mlp()
    assert_refused(model, attempt(name, model, data, steps=None), "steps")


@pytest.mark.parametrize("name", PLAIN)
def test_an_optimizer_of_another_model(name: str):
    model, data = table.mlp()
    assert_refused(model, attempt(name, model, data, optimizer=tiny.sgd(tiny.mlp())), "no given optimizer holds")


@pytest.mark.parametrize("name", [n for n in METHODS if n not in PLAIN])
def test_a_driver_is_not_handed_to_sparsify(name: str):
    model, data = table.mlp()
    unchecked = inspect.unwrap(rarefy.sparsify)  # the types of arguments are checked in tests only
    act = lambda: unchecked(model, ROWS[name].method(), data=data)  # noqa: E731
    assert_refused(model, act, r"method\.run\(model, train\)", TypeError)


@pytest.mark.parametrize("name", METHODS)
def test_two_live_handles(name: str):
    model, data = table.mlp()
    _, first = table.start(rarefy.Random(sparsity=0.5), (model, data))
    assert_refused(model, attempt(name, model, data), "live handle", RuntimeError)
    assert first.attached
    rarefy.check(model, first)


@pytest.mark.parametrize("name", [n for n in PLAIN if getattr(ROWS[n].method(), "grow", None) == "gradient"])
def test_gradients_that_are_no_numbers_at_an_update(name: str):
    method = ROWS[name].method()
    model, data = table.mlp()
    optimizer, s = table.start(method, (model, data))
    due = next(t for t in range(STEPS) if method.wants_dense_gradient(t, STEPS))
    tiny.fit(model, optimizer, due, data)
    optimizer.zero_grad()
    (tiny.loss(model, data[0]) * math.nan).backward()
    weights = {n: tiny.bits(p) for n, p in model.named_parameters()}
    masks = s.masks
    with pytest.raises(ValueError, match=r"gradients of '0\.weight' hold .* NaN"):
        optimizer.step()
    assert {n: tiny.bits(p) for n, p in model.named_parameters()} == weights
    assert all(torch.equal(masks[n], m) for n, m in s.masks.items())
    rarefy.check(model, s)
    tiny.fit(model, optimizer, STEPS, data, lambda _: rarefy.check(model, s), start=s.step)  # and the run can go on


# Those that look at layers' inputs write weights block by block: tests/methods/one_shot/test_layerwise.py.
@pytest.mark.parametrize("name", [n for n in PLAIN if not isinstance(ROWS[n].method(), Layerwise)])
def test_an_error_of_the_method_leaves_the_model(name: str, monkeypatch: pytest.MonkeyPatch):
    """Whatever fails in `begin`, even after masks were staged."""
    model, data = table.mlp()
    method = ROWS[name].method()
    begin = type(method).begin

    def fails(self: Any, s: Sparsity) -> None:
        begin(self, s)
        raise ZeroDivisionError("late")

    monkeypatch.setattr(type(method), "begin", fails)
    assert_refused(model, attempt(name, model, data), "late", ZeroDivisionError)
