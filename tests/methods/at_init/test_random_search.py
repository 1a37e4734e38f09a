import math

import pytest
import torch

import rarefy
import tiny
from rarefy import Random, RandomSearch


def found(method: rarefy.Method, seed: int = 0, data=None, of=tiny.loss) -> tuple[torch.nn.Module, rarefy.Sparsity]:
    model = tiny.mlp()
    s = rarefy.sparsify(model, method, data=data or tiny.batches(), loss=of, seed=seed)
    rarefy.check(model, s)
    return model, s


def test_one_candidate_is_random_with_that_seed():
    searched, _ = found(RandomSearch(0.8, candidates=1), seed=5)
    drawn = tiny.mlp()
    rarefy.sparsify(drawn, Random(0.8), seed=5)
    assert tiny.equal_models(searched, drawn)


def candidates(n: int, data: list[tiny.Batch], **options) -> tuple[list[torch.nn.Module], list[float]]:
    """The first n candidates and their mean losses, drawn one by one."""
    models, losses, seen = [], [], []
    for k in range(n):
        seen.clear()

        def watched(model, batch, seen=seen):
            seen.append(tiny.clone(model))
            return torch.zeros(()) - len(seen)  # ever better: the last candidate is taken

        model, _ = found(RandomSearch(0.8, candidates=k + 1, **options), data=data, of=watched)
        models.append(model)
        with torch.no_grad():
            losses.append(sum(float(tiny.loss(model, batch)) for batch in data) / len(data))
    return models, losses


def test_the_best_of_all_candidates_is_taken():
    data = tiny.batches()
    models, losses = candidates(6, data, batches=None)
    best = min(range(6), key=losses.__getitem__)
    model, _ = found(RandomSearch(0.8, candidates=6, batches=None), data=data)
    assert tiny.equal_models(model, models[best])
    assert len(set(losses)) == 6


@pytest.mark.parametrize("allocation", ["erdos_renyi_kernel", "uniform", "global"])
def test_all_candidates_are_of_one_size(allocation: str):
    """Under `global` layers differ from one candidate to the next; what is asked for is that of the one taken."""
    sizes = []

    def watched(model, batch):
        sizes.append(sum(int(m.weight.count_nonzero()) for m in model if isinstance(m, torch.nn.Linear)))
        return tiny.loss(model, batch)

    _, s = found(RandomSearch(0.8, candidates=5, allocation=allocation), of=watched)
    assert len(sizes) == 5
    assert set(sizes) == {tiny.total(s.masks.values())}


def test_the_first_of_equal_ones_is_taken():
    flat, _ = found(RandomSearch(0.8, candidates=9), of=lambda model, batch: torch.ones(()))
    first, _ = found(RandomSearch(0.8, candidates=1))
    assert tiny.equal_models(flat, first)


def test_a_candidate_without_a_loss_is_never_taken():
    calls = []

    def sometimes(model, batch):
        calls.append(0)
        return torch.tensor(math.nan if len(calls) != 3 else 7.0)

    model, _ = found(RandomSearch(0.8, candidates=4), of=sometimes)
    assert len(calls) == 4
    third, _ = candidates(3, tiny.batches())
    assert tiny.equal_models(model, third[2])


def test_dropout_is_off_and_batch_statistics_are_put_back():
    model = tiny.cnn()
    before = tiny.picture(model)
    data = tiny.batches((3, 4, 4))
    losses = []

    def watched(model, batch):
        losses.append(float(tiny.loss(model, batch)))
        return torch.ones(())

    with pytest.raises(ValueError, match="every candidate has a NaN"):
        rarefy.sparsify(model, RandomSearch(0.5, candidates=2), data=data, loss=lambda m, b: watched(m, b) * math.inf)
    assert tiny.picture(model) == before
    rarefy.sparsify(tiny.cnn(), RandomSearch(0.5, candidates=2), data=data, loss=watched)
    assert losses[:2] == losses[2:]
