"""What one rank of a fully sharded run does, and the same in one process. Both ranks see the same batch, so that the
averaged gradient is that of one process to the bit."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rarefy
from laws.training import OPTIMIZERS, SMALL, VARIANTS
from rarefy import Cubic

STEPS = 14


@dataclass(frozen=True)
class Case:
    """One run. late: shard the model after sparsify, and attach then. to: the dtype."""

    method: str
    optimizer: str = "SGD"
    late: bool = False
    clip: float | None = None
    parts: int = 1
    dtype: torch.dtype = torch.float32


CASES = {
    **{name: Case(name) for name in ("RigL", "SET", "GMP", "SRSTE", "TopKAST", "Magnitude")},
    **{f"{name}, then sharded": Case(name, late=True) for name in ("RigL", "SET", "GMP", "SRSTE", "Magnitude")},
    "RigL every step, accumulated": Case("RigL every step", optimizer="AdamW", parts=3),
    "TopKAST, AdamW": Case("TopKAST", optimizer="AdamW", late=True),
    "GraNet accumulated": Case("GraNet", parts=2),
    "RigL clipped": Case("RigL every step", clip=0.05, dtype=torch.float64),
    "GMP channel": Case("GMP channel"),
    "GMP channel, then sharded": Case("GMP channel", late=True),
    "RigL constant fan-in": Case("RigL constant fan-in", late=True),
    "SRSTE along rows": Case("SRSTE blocks"),
}

EXTRA = {
    "GMP channel": rarefy.GMP(0.4, pattern="channel", schedule=Cubic(start=2, end=0.5, every=4)),
    "SRSTE blocks": rarefy.SRSTE(0.5, pattern="1x4"),
}


def method_of(case: Case) -> rarefy.Method:
    if case.method in EXTRA:
        return EXTRA[case.method]
    if case.method in VARIANTS:
        return VARIANTS[case.method]
    found = rarefy.all_methods()[case.method](**SMALL.get(case.method, {"sparsity": 0.75}))
    assert isinstance(found, rarefy.Method)
    return found


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """65 rows shard into 33 and 32, one row into one and none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(12, 65), nn.LayerNorm(65), nn.Tanh(), nn.Linear(65, 7), nn.Tanh(), nn.Linear(7, 1)
        ).to(dtype)


def shard_(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data_of(step: int, case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(700 + step)
    x, y = (torch.randn(12, n, generator=generator, dtype=torch.float64).to(case.dtype) for n in (12, 1))
    return x, y


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@dataclass
class Run:
    case: Case
    model: nn.Module
    optimizer: torch.optim.Optimizer
    handle: rarefy.Sparsity
    step: int = 0

    def train(self, until: int) -> list[dict[str, Any]]:
        """The state after every second step."""
        found: list[dict[str, Any]] = []
        while self.step < until:
            self._one()
            if self.step % 2 == 0:
                found.append(state_of(self.model, self.optimizer, self.handle))
        return found

    def _one(self) -> None:
        self.optimizer.zero_grad()
        x, y = data_of(self.step, self.case)
        for part in zip(x.tensor_split(self.case.parts), y.tensor_split(self.case.parts), strict=True):
            (nn.functional.mse_loss(self.model(part[0]), part[1], reduction="sum") / len(x)).backward()
        if self.case.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
        self.optimizer.step()
        self.step += 1
        rarefy.check(self.model, self.handle)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, handle: rarefy.Sparsity) -> dict[str, Any]:
    state = optimizer.state_dict()["state"]
    return {
        "masks": handle.masks,
        "weights": {name: whole(w) for name, w in model.state_dict().items()},
        "optimizer": {f"{p}/{k}": whole(v) for p, of in state.items() for k, v in of.items() if v is not None},
        "hidden": {name: site["master"] for name, site in handle.state_dict()["per_site"].items() if "master" in site},
        "kept": [entry.kept for entry in handle.ledger.entries],
        "trainable": [entry.trainable for entry in handle.ledger.entries],
        "explored": handle.ledger.explored,
    }


def start(case: Case, *, sharded: bool) -> Run:
    model: nn.Module = network(dtype=case.dtype)
    make = OPTIMIZERS[case.optimizer]
    if not case.late or not sharded:
        model = shard_(model) if sharded else model
        optimizer = make(model)[0]
        handle = rarefy.sparsify(model, method_of(case), optimizer=optimizer, steps=STEPS, seed=5)
    else:
        handle = rarefy.sparsify(model, method_of(case), steps=STEPS, seed=5)
        model = shard_(model)
        optimizer = make(model)[0]
        handle.attach(optimizer)
    return Run(case, model, optimizer, handle)


def alone(case: Case) -> list[dict[str, Any]]:
    """The run in one process."""
    return start(case, sharded=False).train(STEPS)


def sharded(rank: int) -> dict[str, Any]:
    """Every case on this rank, and what else holds of sharded models."""
    found: dict[str, Any] = {name: start(case, sharded=True).train(STEPS) for name, case in CASES.items()}
    return found | {name: check(rank) for name, check in CHECKS.items()}


# -- stop and go on --------------------------------------------------------------------------------------------------


def _resumed(case: Case) -> dict[str, Any]:
    """Stopped after every fourth step and built anew, sharded."""
    run = start(case, sharded=True)
    while run.step < STEPS:
        saved = copy.deepcopy((run.optimizer.state_dict(), run.handle.state_dict()))
        model = shard_(network(seed=9, dtype=case.dtype))
        model.load_state_dict(run.model.state_dict())
        optimizer = OPTIMIZERS[case.optimizer](model)[0]
        optimizer.load_state_dict(saved[0])
        handle = rarefy.sparsify(model, method_of(case), optimizer=optimizer, steps=STEPS, resume=saved[1])
        run = Run(case, model, optimizer, handle, run.step)
        last = run.train(min(run.step + 4, STEPS))[-1]
    return last


def _taken_over(case: Case) -> dict[str, Any]:
    """Begun in one process, gone on with sharded: the state says nothing about shards."""
    begun = start(case, sharded=False)
    begun.train(STEPS // 2)
    model = shard_(begun.model)
    optimizer = OPTIMIZERS[case.optimizer](model)[0]
    saved = begun.handle.state_dict()
    handle = rarefy.sparsify(model, method_of(case), optimizer=optimizer, steps=STEPS, resume=saved)
    return Run(case, model, optimizer, handle, begun.step).train(STEPS)[-1]


# -- errors, on all ranks alike: one that raised alone would leave the others waiting ----------------------------------


def _refused(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


def _bad_shard(rank: int) -> str:
    model = shard_(network())
    with torch.no_grad():
        weight = model.get_parameter("0.weight").to_local()  # type: ignore[operator]
        if rank == 1:
            weight[0, 0] = torch.nan
    return _refused(lambda: rarefy.sparsify(model, rarefy.Magnitude(0.5)))


def _other_moment(rank: int) -> str:
    case = Case("Magnitude")
    run = start(case, sharded=True)
    with torch.no_grad():
        weight = run.model.get_parameter("0.weight").to_local()  # type: ignore[operator]
        if rank == 0:
            weight.fill_(1.0)
    saved = run.handle.state_dict()
    run.handle.detach()
    return _refused(lambda: rarefy.sparsify(run.model, method_of(case), resume=saved))


def _other_seed(rank: int) -> str:
    model = shard_(network())
    optimizer = OPTIMIZERS["SGD"](model)[0]
    handle = rarefy.sparsify(model, rarefy.Random(0.75), optimizer=optimizer, seed=rank)
    return _refused(lambda: Run(Case("Random"), model, optimizer, handle).train(1))


def _after_evaluation(rank: int) -> str:
    """A forward pass without a backward one leaves gathered copies in the place of the shards."""
    case = Case("RigL")
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))  # everything belongs to the root
    optimizer = OPTIMIZERS["SGD"](model)[0]
    run = Run(case, model, optimizer, rarefy.sparsify(model, method_of(case), optimizer=optimizer, steps=STEPS))
    run.train(3)
    with torch.no_grad():
        run.model(data_of(0, run.case)[0])
    rarefy.check(run.model, run.handle)
    run.handle.attach(run.optimizer)
    run.train(6)
    run.handle.end()
    with torch.no_grad():
        run.model(data_of(0, run.case)[0])
    handle = rarefy.sparsify(run.model, rarefy.Magnitude(0.9), optimizer=run.optimizer)
    with torch.no_grad():
        shards = dict(run.model.named_parameters())
        assert all(isinstance(p, DTensor) for p in shards.values())
        output = run.model(data_of(0, run.case)[0])
        weights = [whole(p) for p in shards.values()]
    plain = network()
    for p, w in zip(plain.parameters(), weights, strict=True):
        p.data = w
    torch.testing.assert_close(output, plain(data_of(0, run.case)[0]))
    rarefy.check(run.model, handle)
    return "nothing"


def _tensor_parallel(rank: int) -> dict[str, Any]:
    """Shards along rows in one layer and along columns in the next; sums of products are split, so float64."""
    found: dict[str, Any] = {}
    for name in ("RigL", "SRSTE", "TopKAST"):
        masks: list[dict[str, Tensor]] = []
        for parallel in (True, False):
            case = Case(name, dtype=torch.float64)
            model = network(dtype=case.dtype)
            model[0], model[1] = nn.Linear(12, 64, dtype=case.dtype), nn.Identity()
            model[3] = nn.Linear(64, 7, dtype=case.dtype)
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 4)
            if parallel:
                plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
                parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
            optimizer = OPTIMIZERS["SGD"](model)[0]
            handle = rarefy.sparsify(model, method_of(case), optimizer=optimizer, steps=STEPS)
            Run(case, model, optimizer, handle).train(STEPS)
            masks.append(handle.masks)
        found[name] = all(torch.equal(mask, masks[1][key]) for key, mask in masks[0].items())
    return found


def _checkpoint(rank: int) -> str:
    """The state goes through a file, as from a stranger."""
    run = start(Case("TopKAST"), sharded=True)
    run.train(6)
    saved = run.handle.state_dict()
    with tempfile.TemporaryFile() as file:
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    run.handle.detach()
    again = rarefy.sparsify(run.model, method_of(run.case), optimizer=run.optimizer, resume=loaded)
    same = all(torch.equal(mask, run.handle.masks[name]) for name, mask in again.masks.items())
    return "nothing" if same else "other masks"


CHECKS: dict[str, Callable[[int], Any]] = {
    "resumed RigL": lambda rank: _resumed(Case("RigL", optimizer="AdamW")),
    "resumed TopKAST": lambda rank: _resumed(Case("TopKAST", optimizer="AdamW")),
    "resumed SRSTE": lambda rank: _resumed(Case("SRSTE")),
    "taken over": lambda rank: _taken_over(Case("SRSTE", optimizer="plain")),
    "bad shard": _bad_shard,
    "other moment": _other_moment,
    "other seed": _other_seed,
    "after evaluation": _after_evaluation,
    "checkpoint": _checkpoint,
    "tensor parallel": _tensor_parallel,
}
