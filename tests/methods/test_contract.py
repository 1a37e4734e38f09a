"""Every registered method obeys the laws: exact counts, zeros, plain models, seeds. See `table.py`."""

import copy
import json
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
import tiny
from methods import table
from methods.table import METHODS, PLAIN, ROWS, SPARSITY, STEPS, Row, units
from rarefy.core.method import Driver
from rarefy.core.sparsity import Sparsity

MODELS = {"mlp": table.mlp, "cnn": table.cnn}
# Every method with every pattern on both models; in the fast part the models take turns.
CASES = [
    pytest.param(
        name, pattern, model, id=f"{name}-{pattern}-{model}", marks=pytest.mark.slow if (i + j + k) % 2 else ()
    )
    for i, (name, row) in enumerate(ROWS.items())
    for j, model in enumerate(MODELS)
    for k, pattern in enumerate(row.patterns)
]


def test_every_registered_method_has_a_row():
    assert set(ROWS) == set(rarefy.all_methods()), "add the method to tests/methods/table.py"


# --- exact, at every step --------------------------------------------------------------------------------------------


def kept_units(s: Sparsity, pattern: str) -> list[int]:
    return [units(pattern, site.mask, site.layout.transposed, site.layout.groups) for site in s.sites]


def all_units(s: Sparsity, pattern: str) -> list[int]:
    return [
        units(pattern, torch.ones_like(s.masks[site.name]), site.layout.transposed, site.layout.groups)
        for site in s.sites
    ]


def law_1(share: float, n: int) -> int:
    return math.floor((1 - Fraction(repr(share))) * n + Fraction(1, 2))


def two_of_four(s: Sparsity) -> bool:
    """Two of every four consecutive inputs, ceil(2·length/4) of a last short group."""
    for site in s.sites:
        rows = site.canonical(site.mask).movedim(1, -1).flatten(0, -2)
        for group in rows.split(4, dim=1):
            if not bool((group.sum(1) == math.ceil(2 * group.shape[1] / 4)).all()):
                return False
    return True


def equal_fan_in(s: Sparsity, budgets: list[int] | None, budget: int) -> bool:
    rows = [site.canonical(site.mask).flatten(1).sum(1) for site in s.sites]
    if not all(bool((r == r[0]).all()) for r in rows):
        return False
    if budgets is not None:
        return [int(r[0]) for r in rows] == [b // len(r) for r, b in zip(rows, budgets, strict=True)]
    short = budget - sum(int(r.sum()) for r in rows)
    return 0 <= short < sum(map(len, rows))


def assert_exact(s: Sparsity, row: Row, pattern: str, t: int) -> None:
    share = row.share(t) if row.share else SPARSITY
    every = all_units(s, pattern)
    budgets, budget = [law_1(share, n) for n in every], law_1(share, sum(every))
    kept = kept_units(s, pattern)
    if pattern == "2:4":
        assert two_of_four(s) or (share == 0 and kept == every), t
    elif pattern == "constant_fan_in":
        assert equal_fan_in(s, budgets if row.per_layer else None, budget), t
    elif row.per_layer:
        assert kept == budgets, t
    else:
        assert sum(kept) == budget, t


def assert_zeros(s: Sparsity) -> None:
    for name, mask in s.masks.items():
        weight = s.model.get_parameter(name)
        assert tiny.positive_zero(weight[~mask]), name


@pytest.mark.parametrize(("name", "pattern", "model"), CASES)
def test_exact_zero_and_plain_at_every_step(name: str, pattern: str, model: str):
    row, built = ROWS[name], MODELS[model]()
    method = row.method(pattern=pattern)
    keys = list(built[0].state_dict())
    types = [type(m) for m in built[0].modules()]

    def look(s: Sparsity) -> None:
        if not isinstance(method, Driver):
            assert_exact(s, row, pattern, s.step)
        assert_zeros(s)
        rarefy.check(built[0], s)
        assert list(built[0].state_dict()) == keys

    s = table.run(method, built, look)
    if isinstance(method, Driver):
        assert_exact(s, row, pattern, STEPS)
    s.end()
    assert_zeros(s)
    rarefy.check(built[0], s)
    assert [type(m) for m in built[0].modules()] == types
    assert not any(map(tiny.hooks, built[0].modules()))
    assert not any(p._post_accumulate_grad_hooks for p in built[0].parameters())
    copy.deepcopy(built[0]).load_state_dict(built[0].state_dict())
    rarefy.sparsify(built[0], rarefy.Dense(), optimizer=tiny.sgd(built[0])).end()  # nothing is held any more


@pytest.mark.parametrize("name", METHODS)
def test_json_round_trip(name: str):
    method = ROWS[name].method()
    again = rarefy.method_from_dict(json.loads(json.dumps(method.to_dict())))
    assert again == method
    assert type(again) is type(method)
    assert hash(again) == hash(method)
    assert str(again) == str(method)


@pytest.mark.parametrize("name", METHODS)
def test_the_class_says_what_it_is(name: str):
    kind = rarefy.all_methods()[name]
    assert kind.needs <= {"data", "loss", "optimizer", "steps", "master", "train"}
    assert kind.stage in {"baseline", "at init", "one shot", "training", "iterative"}
    assert kind.labels[0] in {"static", "dynamic"}
    assert kind.labels[1] in {"dense", "dense-to-sparse", "sparse-to-sparse"}
    assert kind.paper or name in {"Dense", "Prune"}
    assert kind.__doc__


# --- what nobody asked for does not happen ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_begin_touches_weights_only(name: str):
    model, data = table.cnn()
    model[1].eval()  # modes differ from module to module
    model[0].bias.requires_grad_(False)
    before = tiny.picture(model)
    method = ROWS[name].method()
    s = rarefy.sparsify(model, method, data=table.given(method, data), loss=tiny.loss, steps=STEPS)
    after = tiny.picture(model)
    assert set(after) == set(before)
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {f"parameter {site.name}" for site in s.sites}
    for site in s.sites:
        assert after[f"parameter {site.name}"][0] == before[f"parameter {site.name}"][0]
    assert bool(changed) == table.masked_at_start(name)


@pytest.mark.parametrize("name", PLAIN)
def test_begin_keeps_the_gradients_of_kept_weights(name: str):
    model, data = table.mlp()
    tiny.loss(model, data[0]).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    method = ROWS[name].method()
    s = rarefy.sparsify(model, method, data=table.given(method, data), loss=tiny.loss, steps=STEPS)
    everywhere = {site.name: site.trainable for site in s.sites}
    for n, p in model.named_parameters():
        keep = everywhere.get(n, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p.grad, before[n].masked_fill(~keep, 0.0))


def trace(method: Any, seed: int) -> tuple[list[Any], nn.Module]:
    built = table.mlp()
    seen: list[Any] = []
    table.run(method, built, lambda s: seen.append({n: m.clone() for n, m in s.masks.items()}), seed=seed)
    return seen, built[0]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_decides(name: str):
    masks, model = trace(ROWS[name].method(), seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)  # the global generator is nobody's business
        again, twin = trace(ROWS[name].method(), seed=3)
    assert same(masks, again)
    assert tiny.equal_models(model, twin)
    other, _ = trace(ROWS[name].method(), seed=4)
    assert same(masks, other) is not ROWS[name].random


@pytest.mark.parametrize("name", PLAIN)
def test_several_optimizers_are_one(name: str):
    """Layers shared out among optimizers give the run of one, to the bit; a step ends when the last has stepped."""
    together, built = table.mlp(), table.mlp()
    method = ROWS[name].method()
    optimizer, s = table.start(method, together)
    tiny.fit(together[0], optimizer, STEPS, together[1])

    model, data = built
    several = [tiny.sgd(model[i]) for i in (4, 0, 2)]
    arguments = {"data": table.given(method, data), "loss": tiny.loss, "steps": STEPS}
    t = rarefy.sparsify(model, method, optimizer=several, **arguments)
    for step in range(STEPS):
        model.zero_grad()
        tiny.loss(model, data[step % 3]).backward()
        for each in several:
            each.step()
        assert t.step == step + 1
        rarefy.check(model, t)
    assert same([s.masks], [t.masks])
    assert tiny.equal_models(together[0], model)
    assert s.ledger.state_dict() == t.ledger.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_type_of_weight(name: str, dtype: torch.dtype):
    model = tiny.mlp(dtype=dtype)
    data = [(x.to(dtype), y) for x, y in tiny.batches()]

    def look(s: Sparsity) -> None:
        assert_zeros(s)
        rarefy.check(model, s)

    s = table.run(ROWS[name].method(), (model, data), look)
    s.end()
    assert {p.dtype for p in model.parameters()} == {dtype}
