import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import rarefy
import tiny
from rarefy.core.gradients import evaluate_masked, flow_gradients, loss_gradients, take
from rarefy.core.sites import find_sites


def plain_gradients(model: nn.Module, batches: list[tiny.Batch]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        tiny.loss(model, batch).backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("n", [1, 3])
def test_they_are_those_of_backward_summed_over_batches(n: int):
    model, data = tiny.mlp(), tiny.batches()
    found = loss_gradients(model, find_sites(model), data[:n], tiny.loss)
    expected = plain_gradients(tiny.mlp(), data[:n])
    assert all(torch.equal(g, expected[site.name]) for site, g in found.items())


def test_the_temperature_divides_the_output():
    model, data = tiny.mlp(), tiny.batches()
    found = loss_gradients(model, find_sites(model), data[:1], tiny.loss, temperature=7.0)
    twin = tiny.mlp()
    nn.functional.cross_entropy(twin(data[0][0]) / 7, data[0][1]).backward()
    assert all(torch.equal(g, twin.get_parameter(site.name).grad) for site, g in found.items())


def test_nothing_of_the_model_changes():
    model, data = tiny.cnn(), tiny.batches((3, 4, 4))
    model[0].weight.requires_grad_(False)
    tiny.loss(model, data[0]).backward()
    before = tiny.picture(model)
    loss_gradients(model, find_sites(model), data, tiny.loss)
    assert tiny.picture(model) == before

    def fails(model: nn.Module, batch: tiny.Batch) -> torch.Tensor:
        tiny.loss(model, batch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loss_gradients(model, find_sites(model), data, fails, temperature=2.0)
    assert tiny.picture(model) == before


def test_frozen_weights_and_a_surrounding_no_grad():
    model, data = tiny.mlp(), tiny.batches()
    model.requires_grad_(False)
    with torch.no_grad():
        found = loss_gradients(model, find_sites(model), data[:1], tiny.loss)
    expected = plain_gradients(tiny.mlp(), data[:1])
    assert all(torch.equal(g, expected[site.name]) for site, g in found.items())


def test_out_of_reach_is_zero():
    model, data = tiny.mlp(), tiny.batches()

    def without_the_first_layer(m: nn.Module, batch: tiny.Batch) -> torch.Tensor:
        return m[2](torch.ones(8, 12, dtype=torch.float64)).square().sum()

    found = {s.name: g for s, g in loss_gradients(model, find_sites(model), data, without_the_first_layer).items()}
    assert found["2.weight"].all()
    assert not found["0.weight"].any()
    assert not found["4.weight"].any()


def test_something_must_be_within_reach():
    model, other, data = tiny.mlp(), tiny.mlp(1), tiny.batches()

    def detached(m: nn.Module, batch: tiny.Batch) -> torch.Tensor:
        with torch.no_grad():
            return tiny.loss(m, batch)

    for of in (detached, lambda m, batch: tiny.loss(other, batch)):
        with pytest.raises(ValueError, match="depends on none of the sites"):
            loss_gradients(model, find_sites(model), data[:1], of)


@pytest.mark.parametrize("bad", [lambda m, b: m(b[0]), lambda m, b: 1.0, lambda m, b: None])
def test_a_loss_is_a_scalar_tensor(bad):
    model = tiny.mlp()
    with pytest.raises(ValueError, match="must return a scalar tensor"):
        loss_gradients(model, find_sites(model), tiny.batches(), bad)


def test_flow_outputs_of_any_kind():
    """Tuples and mappings of tensors are summed; integers among them are passed over."""

    class Many(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.layer, self.kind = nn.Linear(3, 2), kind

        def forward(self, x):
            y = self.layer(x)
            outputs = {"tuple": (y, y, torch.ones(1).long()), "dict": {"a": y, "b": y}, "none": [3, None]}
            return outputs[self.kind]

    for kind in ("tuple", "dict"):
        model = Many(kind)
        (site,) = find_sites(model)
        keep = {site: torch.ones(2, 3, dtype=torch.bool)}
        assert torch.equal(
            flow_gradients(model, [site], keep, torch.zeros(4, 3))[site], torch.full((2, 3), 2.0).double()
        )
    model = Many("none")
    (site,) = find_sites(model)
    with pytest.raises(ValueError, match="found no floating-point tensor"):
        flow_gradients(model, [site], {site: torch.ones(2, 3, dtype=torch.bool)}, torch.zeros(4, 3))


def test_flow_passes_through_what_is_kept():
    model = tiny.linear([[1.0, -2.0, 3.0]])
    (site,) = find_sites(model)
    mask = tiny.mask([[1, 0, 1]])
    assert flow_gradients(model, [site], {site: mask}, torch.zeros(1, 3))[site].tolist() == [[1.0, 0.0, 1.0]]


def test_a_masked_evaluation_leaves_the_weights():
    model, data = tiny.mlp(), tiny.batches()
    sites = find_sites(model)
    masks = {site: torch.rand(site.parameter.shape, generator=torch.Generator().manual_seed(2)) < 0.5 for site in sites}
    before = tiny.picture(model)
    found = evaluate_masked(model, masks, data, tiny.loss)
    assert tiny.picture(model) == before
    with torch.no_grad():
        for site, mask in masks.items():
            site.parameter.mul_(mask)
        assert found == pytest.approx(sum(float(tiny.loss(model, b)) for b in data) / 3, rel=1e-14)


def test_taking_batches():
    assert take(itertools.count(), 3) == [0, 1, 2]
    assert take([1, 2], None) == [1, 2]
    for data, n, match in (
        ([], None, "no batch"),
        ([1], 2, "holds only 1"),
        (torch.ones(3), 1, "list of "),
        ({"x": 1}, 1, "list of "),
    ):
        with pytest.raises(ValueError, match=match):
            take(data, n)


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "method", [rarefy.SNIP(0.5), rarefy.GraSP(0.5), rarefy.RandomSearch(0.5, candidates=3)], ids=str
)
def test_a_replicated_model_goes_on_training(one_process, method: rarefy.Method):
    """Its wrapper waits for a backward pass after every forward one, unless told otherwise."""
    plain, data = tiny.mlp(), tiny.batches()
    alone = rarefy.sparsify(plain, method, data=data, loss=tiny.loss)
    model = DistributedDataParallel(tiny.mlp())
    s = rarefy.sparsify(model, method, data=data, loss=tiny.loss, optimizer=(optimizer := tiny.sgd(model)))
    assert all(torch.equal(s.masks[f"module.{n}"], m) for n, m in alone.masks.items())
    tiny.fit(model, optimizer, 3, data, lambda _: rarefy.check(model, s))


def test_sharded_weights_are_refused_with_what_would_work(one_process):
    model = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (1,))
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
    sites = find_sites(model)
    keep = {site: torch.ones(4, 4, dtype=torch.bool) for site in sites}
    x = [(torch.ones(2, 4), torch.zeros(2).long())]
    for act in (
        lambda: loss_gradients(model, sites, x, tiny.loss),
        lambda: flow_gradients(model, sites, keep, x[0][0]),
        lambda: evaluate_masked(model, keep, x, tiny.loss),
    ):
        with pytest.raises(ValueError, match="choose the masks before the model is sharded"):
            act()
