import pytest
import torch

import rarefy
import tiny
from rarefy.axes import Score
from rarefy.core.scoring import pool_of, random_masks, score_sites


def handle(data=None, loss=None, model=None, seed: int = 0) -> rarefy.Sparsity:
    s = rarefy.sparsify(model or tiny.mlp(), rarefy.Dense(), seed=seed)
    s.data, s.loss = data, loss
    return s


def test_scores_without_gradients_need_nothing():
    for site, score in score_sites(handle(), Score("magnitude")).items():
        assert torch.equal(score, site.weight.abs())


def test_random_scores_follow_the_handles_generator():
    s = handle(seed=5)
    expected = torch.Generator().manual_seed(5)
    for site, score in score_sites(s, Score("random")).items():
        assert torch.equal(score, torch.rand(site.weight.shape, generator=expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("score", "data", "loss", "match"),
    [
        ("snip", None, tiny.loss, "score snip needs data="),
        ("snip", [1], None, "score snip needs loss="),
        ("grasp", None, None, "score grasp needs data="),
        ("synflow", None, None, "score synflow needs data="),
    ],
)
def test_what_is_missing(score: str, data, loss, match: str):
    with pytest.raises(ValueError, match=match):
        score_sites(handle(data, loss), Score(score))


def test_a_stream_can_be_asked_again_within_one_begin():
    s = handle(iter(tiny.batches()), tiny.loss)
    once = score_sites(s, Score("snip"), batches=2)
    again = score_sites(s, Score("snip"), batches=2)
    assert all(torch.equal(once[site], again[site]) for site in once)


def test_the_wider_type_of_weight_and_gradient():
    """A float16 flow through five layers would overflow."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(5)))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(100.0)
    scores = score_sites(handle([torch.ones(1, 64)], model=model.half()), Score("synflow"))
    for score in scores.values():
        assert score.dtype == torch.float64
        assert float(score[0, 0]) == pytest.approx(100.0**5 * 64**4)


def test_a_random_unit_has_one_draw():
    assert pool_of(Score("random")) == "first"
    assert pool_of(Score("snip")) == "abs_mean"
    assert pool_of(Score("magnitude")) == "mean_abs"


def test_random_masks_are_those_of_the_method():
    for pattern in ("unstructured", "2:4", "2x2", "channel"):
        drawn = rarefy.sparsify(tiny.mlp(), rarefy.Random(0.5, pattern=pattern), seed=9).masks
        s = rarefy.sparsify(tiny.mlp(), rarefy.Random(0.5, pattern=pattern), seed=9)
        s.generator.manual_seed(9)
        masks = random_masks(s, rarefy.ErdosRenyiKernel(), 0.5)
        assert all(torch.equal(drawn[site.name], mask) for site, mask in masks.items())
