"""What one rank of a DistributedDataParallel run does, and the same in one process with the whole batch."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rarefy
from laws.training import OPTIMIZERS, small

STEPS = 16
BATCH = 16  # of all ranks together


@dataclass(frozen=True)
class Case:
    """One run. after: sparsify the wrapped model. parts: micro-batches a step; all but the last under no_sync."""

    method: str
    optimizer: str = "SGD"
    after: bool = False
    view: bool = False
    clip: float | None = None
    parts: int = 1
    dtype: torch.dtype = torch.float64


CASES = {
    "RigL": Case("RigL"),
    "RigL float32": Case("RigL", dtype=torch.float32),
    "RigL after wrapping": Case("RigL", after=True),
    "RigL bucket view": Case("RigL", view=True),
    "RigL clipped": Case("RigL", clip=0.3),
    "RigL accumulated": Case("RigL", parts=3),
    "RigL every step": Case("RigL every step", optimizer="AdamW", view=True, clip=0.3, parts=2),
    "SET": Case("SET", optimizer="AdamW"),
    "GMP": Case("GMP", view=True),
    "GMP accumulated": Case("GMP", parts=2, clip=0.3),
    "SRSTE": Case("SRSTE"),
    "SRSTE after wrapping": Case("SRSTE", optimizer="AdamW", after=True, view=True),
    "TopKAST": Case("TopKAST"),
    "TopKAST accumulated": Case("TopKAST", parts=2, clip=0.3, after=True),
    "GraNet": Case("GraNet"),
    "GraNet accumulated": Case("GraNet", parts=2, clip=0.3, view=True),
    "ITOP": Case("ITOP", view=True),
    "SNIP of the wrapped model": Case("SNIP", after=True),
    "GraSP of the wrapped model": Case("GraSP", after=True),
    "RandomSearch of the wrapped model": Case("RandomSearch", after=True),
}


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)
        ).to(dtype)


def whole_batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(500 + step)
    x = torch.randn(BATCH, 12, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (BATCH,), generator=generator)


def part_of(step: int, case: Case, rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches."""
    x, y = whole_batch(step, case.dtype)
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return list(zip(x[mine].tensor_split(case.parts), y[mine].tensor_split(case.parts), strict=True))


def loss_of(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(given[0]), given[1], reduction="sum")


def alone(case: Case) -> list[dict[str, Any]]:
    """The run in one process."""
    return list(_states(case, 0, 1))


def replicated(rank: int) -> dict[str, Any]:
    """Every case on this rank, the refusals too."""
    world = dist.get_world_size()
    found: dict[str, Any] = {name: list(_states(case, rank, world)) for name, case in CASES.items()}
    found["refusals"] = {name: refusal(rank) for name, refusal in REFUSALS.items()}
    return found


def _states(case: Case, rank: int, world: int) -> Iterator[dict[str, Any]]:
    plain = network(dtype=case.dtype)
    model = _wrapped(plain, case, world) if case.after else plain
    optimizer = OPTIMIZERS[case.optimizer](plain)[0]
    data = [part_of(-1, Case("", dtype=case.dtype), rank, world)[0]]
    handle = rarefy.sparsify(
        model, small(case.method), optimizer=optimizer, steps=STEPS, seed=5, data=data, loss=loss_of
    )
    model = model if case.after else _wrapped(plain, case, world)
    for step in range(STEPS):
        train_step(model, optimizer, part_of(step, case, rank, world), world, case.clip)
        rarefy.check(handle.model, handle)
        yield state_of(plain, handle)


def _wrapped(plain: nn.Module, case: Case, world: int) -> nn.Module:
    return DistributedDataParallel(plain, gradient_as_bucket_view=case.view) if world > 1 else plain


def train_step(
    model: nn.Module, optimizer: Any, parts: list[tuple[Tensor, Tensor]], world: int, clip: float | None = None
) -> None:
    optimizer.zero_grad()
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        with nullcontext() if last or world == 1 else model.no_sync():  # type: ignore[operator]
            (loss_of(model, part) * world / BATCH).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def state_of(plain: nn.Module, handle: rarefy.Sparsity) -> dict[str, Any]:
    masks = {name.removeprefix("module."): mask for name, mask in handle.masks.items()}
    weights = {name: w.detach().clone() for name, w in plain.state_dict().items()}
    return {"masks": masks, "weights": weights, "kept": handle.ledger.nonzeros[-1][1]}


# -- what must be refused, and what must not -------------------------------------------------------------------------


def _other_weights(rank: int) -> str:
    """Each rank chooses its masks from weights of its own, then DistributedDataParallel makes the weights one."""
    model = network(seed=rank)
    optimizer = OPTIMIZERS["SGD"](model)[0]
    handle = rarefy.sparsify(model, rarefy.Magnitude(0.75), optimizer=optimizer)
    return _first_step(DistributedDataParallel(model), optimizer, handle, rank)


def _other_seeds(rank: int) -> str:
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    optimizer = OPTIMIZERS["AdamW"](model)[0]
    method = rarefy.RigL(0.75, every=1)  # its first step wants the dense gradient
    handle = rarefy.sparsify(model, method, optimizer=optimizer, steps=9, seed=rank)
    return _first_step(model, optimizer, handle, rank)


def _other_data(rank: int) -> str:
    """SNIP before wrapping scores by the data of one rank."""
    model = network()
    given = part_of(-1, Case(""), rank, 2)
    handle = rarefy.sparsify(model, rarefy.SNIP(0.75), data=given, loss=loss_of)
    model = DistributedDataParallel(model)
    optimizer = OPTIMIZERS["SGD"](model)[0]
    handle.attach(optimizer)
    return _first_step(model, optimizer, handle, rank)


def _other_hidden_weights(rank: int) -> str:
    """The masks agree, the dense weights behind them do not."""
    model = network()
    handle = rarefy.sparsify(model, rarefy.SRSTE())
    for site in handle.sites:
        assert site.master is not None
        site.master[~site.mask] *= 1 + 0.01 * rank
    optimizer = OPTIMIZERS["SGD"](model)[0]
    handle.attach(optimizer)
    return _first_step(DistributedDataParallel(model), optimizer, handle, rank)


def _models_of_their_own(rank: int) -> str:
    """Two ranks that train two models: any masks will do."""
    model = network(seed=rank)
    optimizer = OPTIMIZERS["SGD"](model)[0]
    handle = rarefy.sparsify(model, rarefy.Magnitude(0.75), optimizer=optimizer)
    return _first_step(model, optimizer, handle, rank)


def _one_rank_only(rank: int) -> str:
    """Nobody waits for a rank that makes nothing sparse."""
    model = network()
    if rank == 1:
        return "nothing"
    optimizer = OPTIMIZERS["SGD"](model)[0]
    handle = rarefy.sparsify(model, rarefy.Magnitude(0.75), optimizer=optimizer)
    return _first_step(model, optimizer, handle, rank)


def _first_step(model: nn.Module, optimizer: Any, handle: rarefy.Sparsity, rank: int) -> str:
    before = [p.detach().clone() for p in model.parameters()]
    try:
        train_step(model, optimizer, part_of(0, Case(""), rank, 2), 2)
    except RuntimeError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return str(error) if same and handle.step == 0 else f"after a step: {error}"
    return "nothing"


REFUSALS = {
    "other weights": _other_weights,
    "other seeds": _other_seeds,
    "other data": _other_data,
    "other hidden weights": _other_hidden_weights,
    "models of their own": _models_of_their_own,
    "one rank only": _one_rank_only,
}
