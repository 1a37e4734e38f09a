import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rarefy
from rarefy.axes import parse_pattern
from rarefy.axes.value import from_dict
from rarefy.bench.controls import Given, narrowed, shuffled
from rarefy.core.sites import find_sites


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 12))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x2", "channel", "constant_fan_in"])
def test_a_shuffled_mask_keeps_the_counts_and_the_pattern_of_every_layer(pattern):
    model = network()
    masks = rarefy.sparsify(model, rarefy.Random(sparsity=0.6, pattern=pattern)).masks
    moved = False
    for site in find_sites(model):
        site.pattern = parse_pattern(pattern)
        new = shuffled(site, masks[site.name], seed=3)
        assert new.sum() == masks[site.name].sum()
        assert new.shape == masks[site.name].shape
        assert site.pattern.legal(site.canonical(new))
        assert torch.equal(new, shuffled(site, masks[site.name], seed=3))
        moved |= not torch.equal(new, masks[site.name])
    assert moved


def test_layers_of_one_shape_are_shuffled_differently():
    first, second = find_sites(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)))
    mask = torch.arange(400).view(20, 20) < 100
    assert not torch.equal(shuffled(first, mask, seed=0), shuffled(second, mask, seed=0))


def test_given_masks_are_kept_through_training_and_json():
    model = network()
    masks = {name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters() if p.ndim > 1}
    method = from_dict(Given.of(masks).to_dict())
    assert method == Given.of(masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sparsity = rarefy.sparsify(model, Given.of(masks), optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 3, 3)).square().sum().backward()
        optimizer.step()
    rarefy.check(model, sparsity)
    for name, mask in masks.items():
        assert torch.equal(sparsity.masks[name], mask)
        assert not model.get_parameter(name)[~mask].any()


def test_given_masks_of_another_network_are_refused():
    with pytest.raises(ValueError, match="masks are given for other, but the sites are weight"):
        rarefy.sparsify(nn.Linear(3, 3), Given.of({"other": torch.ones(3, 3, dtype=torch.bool)}))


def test_given_is_no_method_of_the_library():
    assert "Given" not in rarefy.all_methods()


@given(st.integers(1, 50), st.integers(0, 20), st.integers(0, 5000))
def test_the_narrowed_width_is_the_largest_that_fits(square, line, most):
    def parameters(width: int) -> int:
        return square * width * width + line * width

    width = narrowed(parameters, most)
    assert width == 1 or parameters(width) <= most
    assert parameters(width + 1) > most
