import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from core.capture.references import close, hooked, shrink
from rarefy.core.capture import walk
from rarefy.core.sites import find_sites


class Wrapped(nn.Module):
    """Blocks in a list, called by `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.how = how
        self.memory: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for i, layer in enumerate(self.layers):
            if self.how == "between":
                x = x * 2
            if self.how == "twice":
                x = layer(x)
            if self.how == "backwards":
                layer = self.layers[2 - i]
            x = layer(x)
            if self.how == "skip" and i == 1:
                x = x + first
        return x


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("", ""),
        ("between", "changed before"),
        ("twice", "called twice"),
        ("backwards", "out of order"),
        ("skip", "changed"),
    ],
)
def test_what_cannot_be_replayed_is_run_whole(how: str, reason: str):
    model = Wrapped(how)
    data = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    seen = 0
    for captured in walk(model, find_sites(model), data):
        assert reason in captured.fallback
        assert bool(reason) == bool(captured.fallback)
        for site, x in hooked(model, data, list(captured.block.sites)).items():
            assert close(captured.statistics[site][0].squares, x[0].square().sum(0))
            seen += 1
        shrink(captured)
    assert seen == 3


class Hidden(nn.Module):
    """The third block is told something that follows from the first one's output, beside its own input."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Told() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        told = torch.zeros(4)
        for layer in self.layers:
            x = layer(x, told)
            told = x.mean(0)
        return x


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return self.linear(x + told)


def test_arguments_that_follow_from_earlier_blocks_are_noticed():
    model = Hidden()
    data = [torch.randn(3, 4, generator=torch.Generator().manual_seed(0))]
    for captured in walk(model, find_sites(model), data):
        assert "follows from earlier blocks" in captured.fallback
        ((site, x),) = hooked(model, data, list(captured.block.sites)).items()
        assert close(captured.statistics[site][0].squares, x[0].square().sum(0))
        shrink(captured)


class Attention(nn.Module):
    """Blocks that are told one tensor three times."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x, _ = layer(x, x, x)
        return x


def test_one_tensor_given_three_times_is_one_in_a_replay():
    model = Attention()
    data = [torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))]
    for captured in walk(model, find_sites(model, only="layers"), data):
        assert not captured.fallback
        packed = next(parts for site, parts in captured.statistics.items() if site.name.endswith("in_proj_weight"))
        assert len(packed) == 1


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    extra: tuple[torch.Tensor, ...] = ()


class KindCache:
    """Keys seen so far: a block that were given it twice would attend to everything twice."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor, cache: KindCache | None = None, *, bias: torch.Tensor) -> Output:
        if cache is not None:
            cache.seen.append(x)
        x += bias  # in place, as careless blocks do
        return Output(self.act(self.linear(x)), (bias * 2,))


class Careless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Keeps() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, cache = Output(x.clone(), (torch.ones(4),)), KindCache()
        for layer in self.layers:
            output = layer(output.hidden, cache, bias=output.extra[0])
        return output.hidden


def test_dataclasses_changes_in_place_and_caches():
    model = Careless()
    data = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for captured in walk(model, find_sites(model), data):
        assert not captured.fallback
        ((site, x),) = hooked(model, data, list(captured.block.sites)).items()
        assert close(captured.statistics[site][0].squares, x[0].square().sum(0))
        shrink(captured)


class Masked(nn.Module):
    """Blocks that are told a mask: one object for all, or from some block on another one of the same content."""

    def __init__(self, other_from: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Told() for _ in range(4))
        self.other_from = other_from

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = x.sign()
        other = -mask if len(x) == 2 else mask.clone()
        for i, layer in enumerate(self.layers):
            x = layer(x, mask if i < self.other_from else other)
        return x


@pytest.mark.parametrize("other_from", [1, 2, 9])
def test_a_batch_of_known_shapes_runs_only_as_far_as_new_arguments_come(other_from: int):
    model = Masked(other_from)
    source = torch.Generator().manual_seed(0)
    data = [torch.randn(n, 4, generator=source) for n in (3, 3, 2, 2, 3, 3)]  # the mask is told apart by shape alone
    calls = [0] * 4
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    walked = walk(model, find_sites(model), data)
    begun = next(walked)
    assert not begun.fallback
    through = 1 + 3 + 1 + 2  # the order; first, last and the first of two rows; once disturbed; two verified
    short = [3 if i < other_from < 4 else 0 for i in range(4)]
    assert calls == [through + short[0] + 6, *(through + n for n in short[1:])]
    for captured in itertools.chain([begun], walked):
        ((site, x),) = hooked(model, data, list(captured.block.sites)).items()
        assert close(captured.statistics[site][0].squares, x[0].square().sum(0))


class Fickle(nn.Module):
    """Tells its second block another constant where the first entry is positive, whatever the shapes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Told() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = x.sign()
        positive = bool(x[0, 0] > 0)
        for i, layer in enumerate(self.layers):
            x = layer(x, torch.ones(4) if positive and i == 1 else mask)
        return x


def test_batches_of_one_shape_that_are_called_differently_run_through():
    model = Fickle()
    data = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)).abs() for i in range(4)]
    data[0] = -data[0]  # the last batch shows that shapes say too little
    for captured in walk(model, find_sites(model), data):
        assert not captured.fallback
        ((site, x),) = hooked(model, data, list(captured.block.sites)).items()
        assert close(captured.statistics[site][0].squares, x[0].square().sum(0))
        shrink(captured)
