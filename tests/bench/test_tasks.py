import json

import pytest
import torch

from rarefy.axes.value import from_dict
from rarefy.bench.models import SmallResNet
from rarefy.bench.seeds import generator, stream
from rarefy.bench.tasks import TASKS, Digits, FashionMNIST, FashionMNISTResNet, parse_task

EXAMPLES = {"digits": (2, 64), "fashion-mnist": (2, 1, 28, 28), "fashion-mnist-resnet": (2, 1, 28, 28)}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_survives_json(name):
    task = parse_task(name, steps=7, judge="validation")
    assert from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize("name", TASKS)
def test_networks_give_ten_logits_and_follow_their_seed_alone(name):
    task, x = parse_task(name), torch.ones(EXAMPLES[name])
    torch.manual_seed(1)
    first = task.build(3)
    torch.manual_seed(2)
    again, other = task.build(3), task.build(4)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert first(x).shape == (2, 10)


@pytest.mark.parametrize("name", TASKS)
def test_building_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    parse_task(name).build(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_weights_have_the_variance_of_he():
    weight = Digits().build(0).get_parameter("fc2.weight")
    assert float(weight.detach().std()) == pytest.approx((2 / 300) ** 0.5, rel=0.02)
    assert not Digits().build(0).get_parameter("fc2.bias").any()


def test_networks_are_those_of_the_literature():
    assert sum(p.numel() for p in Digits().build(0).parameters() if p.ndim == 2) == 50_200
    assert sum(p.numel() for p in FashionMNIST().build(0).parameters() if p.ndim == 2) == 266_200
    assert isinstance(FashionMNISTResNet().build(0), SmallResNet)


def test_width_makes_a_network_narrower():
    assert [p.shape[0] for n, p in Digits().build(0, width=30).named_parameters() if "weight" in n] == [30, 10, 10]


def test_unknown_names_and_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="no task is named 'mnist'; there are digits, fashion-mnist"):
        parse_task("mnist")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        parse_task("digits", steps=0)


def test_judging_on_validation_images_never_sees_the_test_images():
    data, held = Digits().load(), parse_task("digits", judge="validation").load()
    assert (len(held.train), len(held.test)) == (960, 240)
    known = {tuple(row) for row in data.train.inputs.tolist()}
    assert all(tuple(row) in known for row in held.test.inputs.tolist())


def test_streams_of_one_seed_are_independent():
    """From one stream, a random mask would keep other weights than the first ones' values say by chance alone."""
    assert len({stream(purpose, 0) for purpose in ("weights", "masks", "order", "other weights")}) == 4
    a, b = (torch.rand(4000, generator=generator(purpose, 0)) for purpose in ("weights", "masks"))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.05
