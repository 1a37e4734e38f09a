"""The orders that a correct implementation must show on real digits: levels move with the split, orders do not.

Five seeds, the task's own recipe (1 500 steps). Every claim is about means over seeds, with a margin far above their
noise; `test_leaderboard` and `test_statistics` check the intervals themselves.
"""

from functools import cache
from statistics import mean

import pytest

import rarefy
from rarefy.bench.execute import Masks, execute, unpack_masks
from rarefy.bench.lineup import make_method
from rarefy.bench.results import Result
from rarefy.bench.runner import settings
from rarefy.bench.runs import Run
from rarefy.bench.tasks import Digits
from rarefy.bench.train import Training, accuracy

pytestmark = pytest.mark.slow

SEEDS = range(5)
TASK = Digits()
DATA = TASK.load()


@cache
def made(name: str, sparsity: float, seed: int, control: str = "none") -> tuple[Result, Masks]:
    run = Run(name, TASK, make_method(name, TASK, sparsity), sparsity, seed, control)
    parent = made(name, sparsity, seed)[1] if run.parent is not None else None
    with settings(threads=1) as environment:
        result, masks = execute(run, DATA, environment, parent=parent)
    return result, unpack_masks(masks, TASK.build(seed))


def accuracies(name: str, sparsity: float, control: str = "none") -> list[float]:
    return [made(name, sparsity, seed, control)[0].train.accuracy for seed in SEEDS]


def explored(name: str, sparsity: float) -> float:
    return mean(made(name, sparsity, seed)[0].train.explored for seed in SEEDS)


def test_at_2_percent_each_idea_pays() -> None:
    uniform, erk, evolved, rigl, gradual = (
        mean(accuracies(name, 0.98)) for name in ("random-uniform", "random", "set", "rigl", "gmp-global")
    )
    assert uniform + 15 < erk
    assert erk + 5 < evolved
    assert evolved + 1 < rigl
    assert rigl < gradual


def test_at_5_percent_dense_and_gradual_lead_and_uniform_trails() -> None:
    uniform, erk, evolved, rigl, gradual = (
        mean(accuracies(name, 0.95)) for name in ("random-uniform", "random", "set", "rigl", "gmp-global")
    )
    assert uniform < erk < evolved
    assert erk < rigl < gradual


def test_global_magnitude_of_first_weights_collapses_where_synflow_does_not() -> None:
    assert mean(accuracies("magnitude-init", 0.98)) < 30
    assert mean(accuracies("synflow", 0.98)) > 90


def test_the_positions_that_snip_chooses_matter_here() -> None:
    assert mean(accuracies("snip", 0.98, "shuffled")) + 3 < mean(accuracies("snip", 0.98))


@pytest.mark.parametrize("sparsity", [0.95, 0.98])
def test_dynamic_masks_explore_and_random_growth_explores_most(sparsity: float) -> None:
    assert explored("random", sparsity) == pytest.approx(1 - sparsity, abs=1e-4)
    assert 1 - sparsity < explored("rigl", sparsity) < explored("set", sparsity)


@pytest.mark.parametrize(
    ("name", "sparsity", "expected"),
    [("set", 0.95, 0.19), ("rigl", 0.95, 0.11), ("set", 0.98, 0.08), ("rigl", 0.98, 0.05)],
)
def test_explored_fraction_is_the_calibrated_one(name: str, sparsity: float, expected: float) -> None:
    assert explored(name, sparsity) == pytest.approx(expected, abs=0.015)


@cache
def n_m_accuracy(method: rarefy.Method, seed: int) -> float:
    """The first two layers n:m, the last dense, as in the calibration runs."""
    with settings(threads=1):
        model = TASK.build(seed)
        training = Training(model, DATA.train, TASK, seed=seed, steps=TASK.steps, tick=lambda _: None)
        sparsity = rarefy.sparsify(
            model, method, optimizer=training.optimizer, steps=TASK.steps, only=["fc1", "fc2"], seed=seed
        )
        training.advance(TASK.steps)
        rarefy.check(model, sparsity)
        sparsity.end()
        return accuracy(model, DATA.test)


def test_at_1_of_16_a_dense_gradient_beats_a_static_mask() -> None:
    static = mean(n_m_accuracy(rarefy.Magnitude(pattern="1:16"), s) for s in SEEDS)
    straight_through = mean(n_m_accuracy(rarefy.SRSTE(pattern="1:16", decay=0.0), s) for s in SEEDS)
    refined = mean(n_m_accuracy(rarefy.SRSTE(pattern="1:16"), s) for s in SEEDS)
    assert static + 0.2 < straight_through
    assert static + 0.2 < refined
    assert abs(straight_through - refined) < 1


def test_at_2_of_4_nothing_differs() -> None:
    means = [
        mean(n_m_accuracy(m, s) for s in SEEDS) for m in (rarefy.Magnitude(pattern="2:4"), rarefy.SRSTE(pattern="2:4"))
    ]
    assert abs(means[0] - means[1]) < 0.5
    assert min(means) > 97
