"""The knee of a made curve, and a sweep that leaves the model alone."""

import copy
import json

import pytest
import torch

import rarefy
import tiny
from rarefy.axes import from_dict
from rarefy.methods.iterative.essential_sparsity import EssentialSparsity, at, essential_sparsity
from rarefy.methods.one_shot.dsnot import DSnoT
from rarefy.methods.one_shot.refit import Refit
from rarefy.methods.one_shot.wanda import Wanda

GRID = [i / 20 for i in range(21)]


def accuracy(s: float) -> float:
    """0.9 up to 0.6, then down to 0.1 at 1."""
    return 0.9 if s <= 0.6 else 0.9 - 2 * (s - 0.6)


def test_the_handbooks_curve():
    assert essential_sparsity([(s, accuracy(s)) for s in GRID]) == (0.6, 0.6)


def test_units_of_the_metric_do_not_matter_and_lower_can_be_better():
    assert essential_sparsity([(s, 500 * accuracy(s)) for s in GRID]) == (0.6, 0.6)
    assert essential_sparsity([(s, 4 - 3 * accuracy(s)) for s in GRID], better="lower") == (0.6, 0.6)


def test_the_tolerance_is_a_share_of_the_dense_metric():
    curve = [(0.0, 100.0), (0.5, 99.0), (0.6, 98.9), (0.9, 10.0)]
    assert essential_sparsity(curve).tolerated == 0.5
    assert essential_sparsity(curve, 0.02) == (0.6, 0.6)


@pytest.mark.parametrize(
    ("curve", "match"),
    [
        ([(0.0, 1.0)], "two points"),
        ([(0.5, 1.0), (0.0, 1.0)], "ascend"),
        ([(0.0, 1.0), (0.9, torch.inf)], "end the grid"),
    ],
)
def test_curves_without_a_knee(curve, match):
    with pytest.raises(ValueError, match=match):
        essential_sparsity(curve)


def test_a_sweep():
    model = tiny.mlp()
    before = copy.deepcopy(model.state_dict())
    sweep = EssentialSparsity(rarefy.Magnitude(0.5), grid=(0.0, 0.25, 0.5, 0.9))
    seen = []

    def kept(pruned: torch.nn.Module) -> float:
        return float(sum(p.ne(0).sum() for name, p in pruned.named_parameters() if "weight" in name))

    found = sweep.run(model, kept, progress=seen.append)
    assert [p.metric for p in found.points] == [248.0, 186.0, 124.0, 25.0]
    assert list(found.points) == seen
    assert found.points[-1].least_density < 0.1 < found.points[0].least_density == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    read = json.loads(json.dumps(found.to_dict()))
    assert from_dict(read["by"]) == sweep
    assert read["points"][1] == found.points[1]._asdict()
    assert read["points"][1]["achieved"] == 0.25


def test_sparsities_reach_the_method_within():
    assert at(Refit(DSnoT(Wanda(0.5, "owl"))), 0.7) == Refit(DSnoT(Wanda(0.7, "owl")))


def test_values_that_cannot_be_swept():
    with pytest.raises(ValueError, match="2:4 fixes its sparsity"):
        EssentialSparsity(rarefy.Magnitude(pattern="2:4"))
    with pytest.raises(ValueError, match="ascend from 0"):
        EssentialSparsity(rarefy.Magnitude(0.5), grid=(0.5, 0.2))
