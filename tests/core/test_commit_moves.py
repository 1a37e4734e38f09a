"""The handle follows its parameters wherever they go; masks that may be staged."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy import Method, register_score
from rarefy.core.commit import find_parameters

# -- parameters that move --------------------------------------------------------------------------------------------


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    dtype = next(model.parameters()).dtype
    for at in range(steps):
        optimizer.zero_grad()
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(at)).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", [rarefy.Random(0.5), rarefy.SRSTE(), rarefy.TopKAST(0.5, 0.75)])
def test_masks_follow_parameters_that_were_replaced(method: Method):
    model = mlp()
    handle = rarefy.sparsify(model, method)
    masks = handle.masks
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
    with pytest.raises(RuntimeError, match="replaced after sparsify"):
        rarefy.check(model, handle)
    optimizer = sgd(model)
    handle.attach(optimizer, steps=9)
    assert all(torch.equal(mask, masks[name]) for name, mask in handle.masks.items())
    train(model, optimizer)
    rarefy.check(model, handle)


@pytest.mark.parametrize("method", [rarefy.Random(0.5), rarefy.SRSTE(), rarefy.TopKAST(0.5, 0.75)])
def test_masks_follow_a_change_of_dtype(method: Method):
    """`model.double()` keeps the parameters and swaps what they hold; so does `.to(device)`."""
    model = mlp()
    handle = rarefy.sparsify(model, method)
    masks = handle.masks
    model.double()
    optimizer = sgd(model)
    handle.attach(optimizer, steps=9)
    assert all(site.master is None or site.master.dtype is torch.float64 for site in handle.sites)
    train(model, optimizer)
    rarefy.check(model, handle)
    if isinstance(method, rarefy.Random):
        assert all(torch.equal(mask, masks[name]) for name, mask in handle.masks.items())


@pytest.mark.parametrize("change", ["shape", "name"])
def test_parameters_that_are_gone_are_named_and_nothing_changes(change: str):
    model = mlp()
    optimizer = sgd(model)
    handle = rarefy.sparsify(model, rarefy.Random(0.5), optimizer=optimizer)
    before = copy.deepcopy(handle.state_dict())
    held = [h.parameter for h in handle.held()]
    if change == "shape":
        model[2] = nn.Linear(6, 5)
    else:
        model[2] = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"no parameter '2.weight' of shape \(4, 6\) any more"):
        handle.attach(sgd(model))
    assert all(h.parameter is p for h, p in zip(handle.held(), held, strict=True))
    assert handle.attached
    assert all(torch.equal(m, torch.as_tensor(handle.masks[n])) for n, m in handle.masks.items())
    assert before["step"] == handle.step


def test_find_parameters_finds_tied_weights_by_their_first_name():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    handle = rarefy.sparsify(model, rarefy.Random(0.5))
    assert find_parameters(handle, model) == {"0.weight": model[0].weight}


# -- what was written while nobody watched ---------------------------------------------------------------------------


def test_attaching_zeroes_what_was_written_to_masked_weights():
    model = mlp()
    handle = rarefy.sparsify(model, rarefy.Magnitude(0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    handle.attach(sgd(model))
    rarefy.check(model, handle)
    for name, mask in handle.masks.items():
        assert bool((model.get_parameter(name)[mask] == 2.0).all())


def test_weights_loaded_after_sparsify_are_those_that_train_on():
    """A dense checkpoint loaded before attaching: the master takes it over, kept and masked entries alike."""
    model, loaded = mlp(), nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    handle = rarefy.sparsify(model, rarefy.SRSTE())
    model.load_state_dict(loaded.state_dict())
    handle.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for site in handle.sites:
        assert site.master is not None
        assert torch.equal(site.master, loaded.get_parameter(site.name))
        assert torch.equal(model.get_parameter(site.name), loaded.get_parameter(site.name) * site.mask)


def test_what_a_master_hides_survives_detaching():
    model = mlp()
    optimizer = sgd(model)
    handle = rarefy.sparsify(model, rarefy.SRSTE(), optimizer=optimizer)
    train(model, optimizer)
    before = [site.weight.clone() for site in handle.sites]
    handle.detach()
    handle.attach(optimizer)
    assert all(torch.equal(site.weight, w) for site, w in zip(handle.sites, before, strict=True))


# -- what a method may stage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "trainable", "says"),
    [
        (torch.ones(4, 8), None, "expected bool"),
        (torch.ones(8, 6, dtype=torch.bool), None, r"of shape \(6, 8\)"),
        (torch.ones(6, 8, dtype=torch.bool, device="meta"), None, "on meta"),
        (torch.ones(6, 8, dtype=torch.bool), torch.ones(6, 8), "expected bool"),
    ],
)
def test_masks_that_cannot_be_are_refused(mask: Tensor, trainable: Tensor | None, says: str):
    handle = rarefy.sparsify(mlp(), rarefy.Magnitude(0.5))
    before = handle.masks
    with pytest.raises(ValueError, match=says):
        handle.keep(handle.sites[0], mask, trainable)
    handle.commit()
    assert all(torch.equal(mask, before[name]) for name, mask in handle.masks.items())


def test_masks_are_copies():
    handle = rarefy.sparsify(mlp(), rarefy.Magnitude(0.5))
    handle.masks["0.weight"].fill_(True)
    assert not handle.masks["0.weight"].all()


def test_a_registered_score_that_says_nothing_keeps_the_first_weights():
    """Ties go to the lower index, through the whole chain down to the mask."""
    register_score("test_commit_flat", lambda weight, gradient, generator: torch.zeros_like(weight))
    model = mlp()
    handle = rarefy.sparsify(model, rarefy.Prune(0.75, score="test_commit_flat", allocation="uniform"))
    expected = torch.zeros(48, dtype=torch.bool)
    expected[:12] = True
    assert torch.equal(handle.masks["0.weight"].flatten(), expected)
