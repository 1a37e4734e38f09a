"""What is in memory: bytes per non-zero over live storages, and nothing of the size of a dense matrix."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

import rarefy
from rarefy import Every
from rarefy.core.sparse import SparseLinear

SIZE = 600


def storages() -> dict[int, int]:
    """Address and bytes of every storage that a tensor somewhere holds."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def trained(method: Any, make: Callable[[nn.Module], Any], steps: int = 7) -> tuple[nn.Module, Any, rarefy.Sparsity]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False), nn.Tanh(), nn.Linear(SIZE, SIZE, bias=False))
    optimizer = make(model)
    handle = rarefy.sparsify(model, method, optimizer=optimizer, steps=20, execution="sparse")
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, SIZE)).square().mean().backward()
        optimizer.step()
    return model, optimizer, handle


MAKES: dict[str, tuple[Callable[[nn.Module], Any], int]] = {
    "SGD momentum": (lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9), 24),
    "Adam": (lambda m: optim.Adam(m.parameters(), lr=0.01), 28),
}


@pytest.mark.parametrize("optimizer", MAKES)
@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize("kind", [rarefy.Random, rarefy.RigL])
def test_bytes_per_non_zero(kind: Any, sparsity: float, optimizer: str) -> None:
    make, most = MAKES[optimizer]
    method = kind(sparsity, **({"every": Every(3, 1.0)} if kind is rarefy.RigL else {}))
    before = storages()
    held = trained(method, make)
    live = sum(size for address, size in storages().items() if address not in before)
    live += sum(len(site.record or b"") for site in held[2].sites)  # type: ignore[attr-defined]
    nonzeros = sum(m.values.numel() for m in held[0].modules() if isinstance(m, SparseLinear))
    pointers = 2 * 2 * 4 * (SIZE + 1)
    assert nonzeros == round((1 - sparsity) * 2 * SIZE * SIZE)
    assert live <= most * nonzeros + pointers + 2048  # the generator, step counters


class Largest(TorchDispatchMode):
    """Remembers the largest floating-point tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.is_floating_point():
                self.entries = max(self.entries, made.numel())
        return out


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as seen:
        yield seen


@pytest.mark.parametrize("name", ["RigL", "SET", "ITOP"])
def test_no_dense_gradient_or_score_is_ever_whole(name: str) -> None:
    """Updates at steps 3 and 6; chunks of a quarter of the rows at most."""
    method = rarefy.all_methods()[name](0.9, every=Every(3, 1.0))
    model, optimizer, handle = trained(method, MAKES["Adam"][0], steps=2)
    before = handle.masks
    with largest() as seen:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(2, SIZE)).square().mean().backward()
            optimizer.step()
    assert not torch.equal(handle.masks["0.weight"], before["0.weight"])
    assert 0 < seen.entries <= SIZE * SIZE // 4
