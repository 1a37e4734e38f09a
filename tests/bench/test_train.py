import copy
from itertools import chain, islice

import pytest
import torch
from torch import nn

from rarefy.bench.data import Split
from rarefy.bench.tasks import Digits
from rarefy.bench.train import Training, accuracy, balanced, batches, loss

SPLIT = Split(torch.arange(30.0)[:, None], torch.arange(30) % 3)


def training(steps: int, seed: int = 0) -> Training:
    task = Digits(steps=steps)
    return Training(task.build(seed), task.load().train, task, seed=seed, steps=steps, tick=lambda _: None)


def test_an_epoch_shows_every_image_once_in_an_order_of_the_seed():
    first = [x.flatten().tolist() for x, _ in islice(batches(SPLIT, 10, seed=1), 6)]
    for epoch in (first[:3], first[3:]):
        assert sorted(chain(*epoch)) == list(range(30))
    assert first[:3] != first[3:]
    assert first == [x.flatten().tolist() for x, _ in islice(batches(SPLIT, 10, seed=1), 6)]
    assert first != [x.flatten().tolist() for x, _ in islice(batches(SPLIT, 10, seed=2), 6)]


def test_an_incomplete_batch_is_left_out_and_too_large_a_one_refused():
    assert {len(y) for _, y in islice(batches(SPLIT, 8, seed=0), 9)} == {8}
    with pytest.raises(ValueError, match="a batch of 31 needs as many training images; there are 30"):
        next(batches(SPLIT, 31, seed=0))


def test_a_balanced_batch_has_as_many_images_of_every_class():
    images, labels = balanced(SPLIT, 4, seed=0)
    assert labels.bincount().tolist() == [4, 4, 4]
    assert torch.equal(images.flatten().long() % 3, labels)


def test_a_training_that_pauses_is_the_training_that_does_not():
    whole, parts = training(40), training(40)
    whole.advance(40)
    for until in (7, 7, 31, 40):
        parts.advance(until)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_learning_rate_falls_on_a_half_cosine():
    run = training(4)
    rates = []
    for step in range(4):
        run.advance(step + 1)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], abs=1e-7)


def test_ticks_add_up():
    told: list[int] = []
    run = training(60)
    run.tick = told.append
    run.advance(33)
    run.advance(60)
    assert sum(told) == 60


def test_training_learns_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    run, data = training(60), Digits().load()
    untrained = accuracy(run.model, data.test)
    run.advance(60)
    assert accuracy(run.model, data.test) > max(70, untrained)
    assert torch.equal(torch.get_rng_state(), before)


def test_accuracy_is_taken_in_evaluation_mode_and_the_mode_is_restored():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.BatchNorm1d(3))
    before = copy.deepcopy(model.state_dict())
    accuracy(model, SPLIT)
    assert model.training
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


def test_accuracy_and_loss_by_hand():
    class Third(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 3).double()

    assert accuracy(Third(), SPLIT) == pytest.approx(100 / 3)
    value = loss(Third(), (SPLIT.inputs[:1], SPLIT.labels[:1]))
    assert float(value) == pytest.approx(0.5514447)  # log(e + 2) − 1
