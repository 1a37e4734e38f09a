"""What a walk leaves out of its runs, and that nobody can tell from the statistics."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from architectures import build
from core.capture.references import close, hooked
from rarefy.core.capture import walk
from rarefy.core.sites import find_sites


class Products(TorchDispatchMode):
    """Counts the matrix products that are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
        return func(*args, **(kwargs or {}))


class Layers(nn.Module):
    """Three layers after one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Chunks(Layers):
    """The last layer is called once for every two tokens, as feed-forward layers with chunks are."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return torch.cat([self.c(part) for part in x.split(2)])


class Squeamish(Layers):
    """It refuses an output of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not out.any():
            raise ArithmeticError("all of it is zero")
        return out


class Depends(Layers):
    """What comes after the layer that was the last depends on its output."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if bool(out.ne(0).all()) else self.a(out)


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


def batches(*lengths: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(length, 4, generator=g) for length in lengths]


def agree(model: nn.Module, data: list[Any]) -> None:
    """Statistics are those of forward hooks."""
    sites = find_sites(model)
    known = hooked(model, data, sites)
    for captured in walk(model, sites, data, gram=torch.float64):
        for site in captured.block.sites:
            (part,) = captured.statistics[site]
            assert part.tokens == known[site].shape[1]
            assert part.gram is not None
            assert close(part.gram, known[site][0].T @ known[site][0])


class Chain(nn.Module):
    """Two blocks of one kind."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([made(kind), made(kind)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


@pytest.mark.parametrize("kind", [Layers, Chunks, Squeamish, Depends])
@pytest.mark.parametrize("lengths", [(2, 2, 2), (2, 6, 2), (6, 2, 2), (1, 1, 5)])
def test_statistics_do_not_depend_on_what_is_left_out(kind: type[nn.Module], lengths: tuple[int, ...]):
    agree(Chain(kind), batches(*lengths))


def test_the_last_product_of_a_block_is_carried_out_once():
    model, data = Chain(Layers), batches(2, 2, 2, 2)
    walking = walk(model, find_sites(model), data)
    next(walking)
    with Products() as products:
        next(walking)
    advance, observed, left_out = 4 * 3, 4 * 3, 3
    assert products.count == advance + observed - left_out


def test_nothing_is_carried_out_after_the_last_site():
    model, data = Chain(Layers), batches(2, 2, 2, 2)
    walking = walk(model, [site for site in find_sites(model) if ".a." in site.name], data)
    next(walking)
    with Products() as products:
        next(walking)
    assert products.count == 4 * 3 + 3  # one run of the first block, and the first batch of the second


class Fails(Layers):
    """It refuses three tokens, whenever somebody looks at its products."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if len(x) == 3 and _get_current_dispatch_mode() is not None:
            self.times += 1
            raise ArithmeticError("three tokens")
        return out


def test_an_error_of_the_models_own_is_told():
    model = Chain(Fails)
    with pytest.raises(ArithmeticError, match="three tokens"):
        list(walk(model, find_sites(model), batches(2, 3)))
    assert model.layers[0].times == 2  # cut short, then whole


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "T5"])
def test_products_are_saved_in_real_blocks(name: str):
    model, data = build(name, batches=5)
    sites = [site for site in find_sites(model) if not site.layout.stacked]
    counts = []
    for several in (data[:1], data):
        with Products() as products:
            list(walk(model, sites, several))
        counts.append(products.count)
    assert counts[1] < 5 * counts[0]


def test_under_autocast_too():
    model, data = Chain(Layers), batches(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        captured = next(walk(model, find_sites(model), data))
        found = {site.name: captured.statistics[site][0].squares.clone() for site in captured.block.sites}
        x = model.layers[0].b(model.layers[0].a(torch.cat(data)))
    assert torch.allclose(found["layers.0.c.weight"], x.detach().double().square().sum(0))
