import pytest
import torch

import rarefy
import tiny
from rarefy import AtLeast, Prune
from rarefy.methods.one_shot.prune import ByScore

SCORES = ["random", "magnitude", "taylor", "snip", "grasp", "synflow"]
ALLOCATIONS = ["uniform", "uniform_plus", "erdos_renyi", "erdos_renyi_kernel", "global", "lamp", "balanced"]
PATTERNS = ["unstructured", "2:4", "3:5", "2x2", "4x1", "constant_fan_in", "channel"]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_score_with_every_pattern_and_allocation(score: str, pattern: str):
    data = tiny.batches((3, 4, 4), n=1)
    inputs = [x for x, _ in data] if score == "synflow" else data
    for allocation in ALLOCATIONS:
        if allocation == "lamp" and score == "grasp":
            continue  # refused, see below
        model = tiny.cnn()
        method = Prune(0.4, score=score, allocation=allocation, pattern=pattern)
        s = rarefy.sparsify(model, method, data=inputs, loss=tiny.loss)
        rarefy.check(model, s)
        assert rarefy.method_from_dict(method.to_dict()) == method


def test_lamp_takes_no_negative_scores():
    with pytest.raises(ValueError, match="negative scores"):
        rarefy.sparsify(tiny.mlp(), Prune(0.5, score="grasp", allocation="lamp"), data=tiny.batches(), loss=tiny.loss)


def test_a_score_of_ones_own():
    name = "test_prune_first_columns"
    if name not in rarefy.axes.score.scores():
        rarefy.register_score(name, lambda w, g, generator: -torch.arange(w.shape[1]).expand(w.shape).to(w))
    # signed scores pool as magnitudes: the last columns win
    s = rarefy.sparsify(tiny.linear([[1.0] * 4] * 2), Prune(0.5, score=name, allocation="uniform"))
    assert s.masks["weight"].int().tolist() == [[0, 0, 1, 1]] * 2


def test_taylor_pools_magnitudes_and_snip_the_signed_mean():
    gradient = torch.tensor([[3.0, -3.0], [1.0, 1.0]], dtype=torch.float64)
    weighted = lambda m, batch: (m.weight * batch).sum()  # noqa: E731
    kept = {}
    for score in ("taylor", "snip"):
        model = tiny.linear([[1.0, 1.0], [1.0, 1.0]])
        s = rarefy.sparsify(model, Prune(0.5, score=score, pattern="channel"), data=[gradient], loss=weighted)
        kept[score] = s.masks["weight"].any(1).tolist()
    assert kept == {"taylor": [True, False], "snip": [False, True]}


def test_the_minimum_is_a_floor_under_the_allocation():
    a, b = tiny.mlp(), tiny.mlp()
    rarefy.sparsify(a, Prune(0.95, minimum=0.01))
    rarefy.sparsify(b, Prune(0.95, allocation=AtLeast("global", share=0.01)))
    assert tiny.equal_models(a, b)


def test_only_what_matters_is_a_field():
    """`Magnitude(score="random")` would be a lie in a result file."""
    for method in (rarefy.Magnitude, rarefy.Random, rarefy.SNIP, rarefy.GraSP):
        assert issubclass(method, ByScore)
        with pytest.raises(ValueError, match="no field 'score'"):
            method(0.5, score="taylor")
    assert "ByScore" not in rarefy.all_methods()


def test_mappings_and_tuples_are_batches():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.layer(left + right)

    x = torch.ones(4, 3)
    for batch in ((x, x), {"left": x, "right": x}):
        s = rarefy.sparsify(Net(), Prune(0.5, score="synflow"), data=[batch])
        assert int(s.masks["layer.weight"].sum()) == 3
