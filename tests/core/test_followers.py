import pytest
import torch
from torch import nn

import rarefy
import tiny
from rarefy.core.followers import find_followers
from rarefy.core.sites import find_sites


def followers(model: nn.Module) -> dict[str, list[str]]:
    sites = find_sites(model)
    find_followers(model, sites)
    return {site.name: [f.name for f in site.followers] for site in sites}


def test_bias_and_the_norm_behind():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.Flatten(1)
    )
    assert followers(model) == {"0.weight": ["0.bias", "1.weight", "1.bias"], "3.weight": []}


class Block(nn.Module):
    """The order of definition says nothing; a norm after the sum is no layer's own."""

    def __init__(self, untraceable: bool = False) -> None:
        super().__init__()
        self.untraceable = untraceable
        self.n2, self.n1, self.after = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)
        self.c1, self.c2 = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if self.untraceable and x.sum() > 0:
            return x
        y = self.n1(self.c1(x))
        return self.after(x + self.n2(self.c2(y)))


def test_the_norm_is_found_where_it_is_used():
    assert followers(Block()) == {
        "c1.weight": ["n1.weight", "n1.bias"],
        "c2.weight": ["c2.bias", "n2.weight", "n2.bias"],
    }


def test_without_a_trace_it_is_the_norm_that_stands_right_behind():
    model = nn.Sequential(Block(untraceable=True), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 2))
    assert followers(model) == {
        "0.c1.weight": [],
        "0.c2.weight": ["0.c2.bias"],
        "1.weight": ["1.bias", "2.weight", "2.bias"],
        "3.weight": ["3.bias"],
    }
    assert followers(nn.Sequential(Block(True), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(3)))["1.weight"] == ["1.bias"]


def test_a_norm_of_two_layers_follows_neither():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(self.b(x))

    assert followers(Shared()) == {"a.weight": ["a.bias"], "b.weight": ["b.bias"]}


def test_a_norm_that_is_called_twice_follows_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.layer(self.norm(self.layer(x))))

    assert followers(Twice()) == {"layer.weight": ["layer.bias", "norm.weight", "norm.bias"]}


def test_norms_without_scale():
    assert followers(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False))) == {"0.weight": []}


def test_looking_for_them_disturbs_nothing():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.norm(self.layer(x)) + torch.randn(4)

    model = Counting()
    before = tiny.picture(model)
    assert followers(model)["layer.weight"] == ["layer.bias", "norm.weight", "norm.bias"]
    assert tiny.picture(model) == before


def test_a_masked_channel_is_silent_through_training_and_counts_only_weights():
    """Its bias, scale and shift are zero with it, so that after its norm it gives exactly zero."""
    model, data = tiny.cnn(), tiny.batches((3, 4, 4))
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, rarefy.Random(0.5, pattern="channel"), optimizer=optimizer, steps=10)
    tiny.fit(model, optimizer, 10, data, lambda _: rarefy.check(model, s))
    dead = ~s.masks["0.weight"].flatten(1).any(1)
    assert dead.any()
    for t in (model[0].bias, model[1].weight, model[1].bias):
        assert tiny.positive_zero(t[dead])
        assert t[~dead].all()
    model.eval()
    out = model[1](model[0](data[0][0]))
    assert not out[:, dead].any()
    assert s.sparsity == 1 - tiny.total(s.masks.values()) / sum(m.numel() for m in s.masks.values())
    assert not s.masks.keys() & {"0.bias", "1.weight"}


@pytest.mark.parametrize("pattern", ["unstructured", "2x2", "2:4"])
def test_only_channels_have_followers(pattern: str):
    s = rarefy.sparsify(tiny.cnn(), rarefy.Magnitude(0.9, pattern=pattern))
    assert not any(site.followers for site in s.sites)
