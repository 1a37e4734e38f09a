import json

import pytest
import torch

import rarefy
import tiny
from methods import table
from rarefy import Cubic, Every
from rarefy.core.ledger import Ledger, rigl_training_flops
from rarefy.core.method import Driver

FLOPS = {"0.weight": 1000.0, "2.weight": 300.0, "4.weight": 70.0, "head": 11.0}  # "head" is no site
REST = FLOPS["head"]


def sparse(masks: dict[str, torch.Tensor]) -> float:
    return sum(FLOPS[n] * int(m.sum()) / m.numel() for n, m in masks.items()) + REST


DENSE = sum(FLOPS.values())

# Per sample and step: f = forward under the masks, b = under the trainable set, d = dense, g = dense gradient gathered.
ROWS = {
    "Dense": lambda f, b, g: 3 * DENSE,
    "Random": lambda f, b, g: 3 * f,
    "RandomSearch": lambda f, b, g: 3 * f,
    "Magnitude": lambda f, b, g: 3 * f,
    "Prune": lambda f, b, g: 3 * f,
    "SNIP": lambda f, b, g: 3 * f,
    "GraSP": lambda f, b, g: 3 * f,
    "SynFlow": lambda f, b, g: 3 * f,
    "SET": lambda f, b, g: 3 * f,
    "GMP": lambda f, b, g: 3 * f,
    "RigL": lambda f, b, g: 2 * f + (DENSE if g else f),
    "ITOP": lambda f, b, g: 2 * f + (DENSE if g else f),
    "GraNet": lambda f, b, g: 2 * f + (DENSE if g else f),
    "TopKAST": lambda f, b, g: 2 * f + b,
    "SRSTE": lambda f, b, g: f + 2 * DENSE,
    "IMP": lambda f, b, g: 3 * f,
    **dict.fromkeys(("Wanda", "SparseGPT", "ALPS", "DSnoT", "Refit"), lambda f, b, g: 3 * f),
}


@pytest.mark.parametrize("name", list(table.ROWS))
def test_training_flops_by_method(name: str):
    """The rows of the convention, added up step by step beside the ledger."""
    method, built = table.ROWS[name].method(), table.mlp()
    spent = []
    now = {}

    def look(s: rarefy.Sparsity) -> None:
        if now and now["step"] < s.ledger.steps:  # a step is complete: it ran under what held before it
            spent.append(ROWS[name](now["sparse"], now["trainable"], now["gathered"]))
        now.update(
            step=s.ledger.steps,
            sparse=sparse(s.masks),
            trainable=sparse({site.name: site.trainable for site in s.sites}),
            gathered=s.method.wants_dense_gradient(s.step, s.steps),
        )

    s = table.run(method, built, look)
    assert len(spent) == s.ledger.steps == (3 * table.STEPS if isinstance(method, Driver) else table.STEPS)
    assert s.ledger.training_flops(FLOPS, samples=8) == pytest.approx(8 * sum(spent), rel=1e-12)
    assert s.ledger.forward_flops(FLOPS) == pytest.approx(sparse(s.masks), rel=1e-12)


def test_every_method_has_a_row():
    assert set(ROWS) == set(rarefy.all_methods())


def test_the_formula_of_rigl():
    """f_S = .2 f_D, ΔT = 100 → .2026 of dense; in ours the update is one of the ΔT steps."""
    assert rigl_training_flops(0.2, 1.0, 100) / 3 == pytest.approx(0.2026, abs=5e-5)
    ledger = Ledger(["w"], [100], steps=100, dense_steps=[0])
    ledger.record(0, [20], [20], 0)
    assert ledger.training_flops({"w": 1.0}) == pytest.approx(3 * 0.2 * 99 + 2 * 0.2 + 1)


def test_counts_of_every_change():
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    method = rarefy.GMP(0.75, schedule=Cubic(end=6, every=3))
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=10)
    tiny.fit(model, optimizer, 10, data)
    # .75·(1 − ½³) = .65625: 41 + 33 + 11, then 30 + 24 + 8
    assert s.ledger.nonzeros == [(0, 248), (3, 85), (6, 62)]
    assert s.ledger.average_parameters() == (3 * 248 + 3 * 85 + 4 * 62) / 10


def test_counts_that_do_not_change_take_no_room():
    """Masks move in every step of SR-STE; what it keeps does not."""
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, rarefy.SRSTE(), optimizer=optimizer)
    tiny.fit(model, optimizer, 20, data)
    assert len(s.ledger.entries) == 1
    assert s.ledger.flip_rate() > 0


def test_flips_and_explored_by_hand():
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, rarefy.SET(0.8, every=Every(2, 1.0)), optimizer=optimizer, steps=11)
    union, last, flips = dict(s.masks), s.masks, 0

    def after(t: int) -> None:
        nonlocal last, flips
        flips += sum(int((m ^ last[n]).sum()) for n, m in s.masks.items())
        last = s.masks
        for n, m in last.items():
            union[n] = union[n] | m

    tiny.fit(model, optimizer, 11, data, after)
    assert s.ledger.explored == tiny.total(union.values()) / 248
    assert s.ledger.flip_rate() == pytest.approx(flips / 11 / 248)
    assert flips > 0


def test_average_parameters_of_the_journey():
    """Cubic from a quarter to three quarters of the run: N̄ = N·(1 − .625 s)."""
    for s, expected in ((0.5, 0.6875), (0.8, 0.5)):
        cubic, ledger = Cubic(start=0.25, end=0.75), Ledger(["w"], [1_000_000])
        for step in range(1000):
            kept = round((1 - cubic.sparsity(step, s, 1000)) * 1_000_000)
            ledger.record(step, [kept], [kept], 0)
        ledger.steps = 1000
        assert ledger.average_parameters() / 1_000_000 == pytest.approx(expected, abs=1e-3)


def test_before_any_step():
    ledger = Ledger(["w"], [10])
    assert ledger.average_parameters() == 0.0
    ledger.record(0, [4], [10], 0)
    assert ledger.average_parameters() == 4.0
    assert ledger.training_flops({"w": 10.0}) == 0.0
    assert ledger.forward_flops({"w": 10.0}) == 4.0
    assert ledger.flip_rate() == 0.0


def test_changes_within_one_step_are_one():
    ledger = Ledger(["a", "b"], [10, 10])
    ledger.record(0, [10, 10], [10, 10], 0)
    ledger.steps = 1
    ledger.record(1, [5, 10], [5, 10], 5)
    ledger.record(1, [5, 5], [5, 5], 5)
    assert [(e.step, e.kept, e.flips) for e in ledger.entries] == [(0, [10, 10], 0), (1, [5, 5], 10)]


def test_a_layer_that_looks_up_costs_nothing():
    ledger = Ledger(["embed", "w"], [100, 10], steps=1)
    ledger.record(0, [50, 5], [50, 5], 0)
    assert ledger.training_flops({"w": 20.0}) == 30.0


def test_json_round_trip():
    ledger = Ledger(["w"], [10], steps=3, dense_steps=[1], explored_counts=[7])
    ledger.record(0, [4], [10], 2)
    again = Ledger(["w"], [10])
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again == ledger
