"""A method that writes down what it is told, a net to tell it about, and words for bit-exact zeros."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from rarefy import Sparsity
from rarefy.axes import Channel, Pattern, Unstructured
from rarefy.core.method import Method

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Told:
    """One call of `on_gradients`."""

    step: int
    deciding: bool
    ready: tuple[str, ...]
    gradients: dict[str, Tensor]
    dense: dict[str, Tensor]


@dataclass
class Log:
    told: list[Told] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)  # s.step at each call of on_weights
    act: Callable[[Sparsity], None] | None = None  # to be done in on_gradients, after writing down

    @property
    def steps(self) -> list[int]:
        return [told.step for told in self.told]


LOGS: dict[int, Log] = {}  # by the seed of the handle: a method is a value and remembers nothing


@dataclass(frozen=True)
class Recorder(Method):
    """Fixed masks by a rule of positions. dense: the dense gradient is wanted before every so many steps (0: never)."""

    dense: int = 0

    needs = frozenset({"optimizer"})

    def begin(self, s: Sparsity) -> None:
        for site in s.sites:
            s.keep(site, checkered(site.parameter.shape))

    def wants_dense_gradient(self, step: int, steps: int | None) -> bool:
        return self.dense > 0 and step % self.dense == self.dense - 1

    def on_gradients(self, s: Sparsity) -> None:
        log, wanted = LOGS[s.seed], self.wants_dense_gradient(s.step, s.steps)
        log.told.append(
            Told(
                s.step,
                s.deciding,
                tuple(site.name for site in s.ready),
                {x.name: x.gradient.clone() for x in s.ready if x.parameter.grad is not None},
                {x.name: s.dense_gradient(x).clone() for x in s.ready} if wanted else {},
            )
        )
        if log.act is not None:
            log.act(s)

    def on_weights(self, s: Sparsity) -> None:
        LOGS[s.seed].moved.append(s.step)


@dataclass(frozen=True)
class Mover(Method):
    """Masks that move one place to the right after step `at`."""

    at: int = 3
    pattern: Pattern = field(default_factory=Unstructured)

    needs = frozenset({"optimizer"})

    def begin(self, s: Sparsity) -> None:
        for site in s.sites:
            s.keep(site, checkered(site.parameter.shape, channels=self.pattern == Channel()))

    def on_weights(self, s: Sparsity) -> None:
        if s.step == self.at:
            for site in s.sites:
                s.keep(site, checkered(site.parameter.shape, moved=1, channels=self.pattern == Channel()))


def recorded(
    model: nn.Module, optimizer: Any, *, dense: int = 0, seed: int = 0, **arguments: Any
) -> tuple[Sparsity, Log]:
    """A handle of a Recorder and its log."""
    log = LOGS[seed] = Log()
    return rarefy.sparsify(model, Recorder(dense=dense), optimizer=optimizer, seed=seed, **arguments), log


def checkered(shape: tuple[int, ...], moved: int = 0, channels: bool = False) -> Tensor:
    """A mask that keeps every third weight (or output channel), beginning with the first or `moved` later."""
    size = shape[0] if channels else torch.Size(shape).numel()
    units = (torch.arange(size) - moved) % 3 == 0
    return units.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone() if channels else units.reshape(shape)


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def data(step: int, dtype: torch.dtype = torch.float32, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs, targets = data(step, dtype)
    return (model(inputs) - targets).square().mean()


def nonzeros(s: Sparsity) -> dict[str, int]:
    """Masked weights (and followers) that are not +0.0 to the bit, by name; empty when all is well."""
    found: dict[str, int] = {}
    for site in s.sites:
        masks = {site.name: site.mask}
        for follower in site.followers:
            masks[follower.name] = site.mask.flatten(1).any(1)
        for name, mask in masks.items():
            weight = s.model.get_parameter(name).detach()
            wrong = int(weight.view(_INTEGERS[weight.element_size()])[~mask].ne(0).sum())
            if wrong:
                found[name] = wrong
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
