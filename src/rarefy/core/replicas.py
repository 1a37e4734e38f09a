"""Replicas must hold the same masks: they are compared once, at the first optimizer step after `attach`.

No collective is called, so that nothing hangs where only some ranks are sparse: each rank leaves a digest of its masks
in the store of the default process group and reads those that lie there. Ranks that differ are replicas of one model
only if their reduced gradients are the same to the bit (ranks that hold parts of a model, or models of their own, may
have any masks they like), so a digest of a gradient lies there too. Sharded weights are parts of one mask by
construction: there a difference in what it was made from is enough.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from rarefy.core import bits
from rarefy.core.held import distributed, local
from rarefy.core.sites import Site

if TYPE_CHECKING:
    import rarefy.core.sparsity

_PATIENCE = timedelta(seconds=30)  # for the gradient of a rank whose masks differ: replicas step together
_meetings: Counter[str] = Counter()


def compare_at_first_step(s: rarefy.core.sparsity.Sparsity, optimizers: Sequence[Optimizer]) -> list[Any]:
    """Leave the digest of this rank's masks; hooks, to be registered before all others, that compare it with the rest.

    Without a process group of several ranks there is nothing to do. The first step raises RuntimeError on replicas with
    different masks, before anything is changed.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return []
    if dist.get_backend() == "fake":  # ranks that do not exist, and a store that holds nothing
        return []
    meeting = _Meeting(s)
    return [optimizer.register_step_pre_hook(meeting) for optimizer in optimizers]


class _Meeting:
    def __init__(self, s: rarefy.core.sparsity.Sparsity) -> None:
        self.sites = s.sites
        found = (distributed(site.parameter) for site in s.sites)
        sharded = next((parameter for parameter in found if parameter is not None), None)
        ranks = torch.arange(dist.get_world_size()) if sharded is None else sharded.device_mesh.mesh.flatten()
        self.sharded = sharded is not None
        self.others = [int(rank) for rank in ranks if int(rank) != dist.get_rank()]
        _meetings[s.site_hash] += 1
        self.topic = f"rarefy/{s.site_hash}/{_meetings[s.site_hash]}"
        self.store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        self.mine = _made_from(s) if self.sharded else _digest(_masks(s.sites))
        self.store.set(f"{self.topic}/masks/{dist.get_rank()}", self.mine)
        self.over = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.over:
            return
        self.over = True
        gradient = "" if self.sharded else _digest(_gradient(self.sites))
        self.store.set(f"{self.topic}/gradient/{dist.get_rank()}", gradient)
        unlike = [r for r in self.others if self._read("masks", r) not in (None, self.mine)]
        if not self.sharded:
            unlike = [r for r in unlike if gradient and self._wait("gradient", r) == gradient]
        if unlike:
            raise RuntimeError(
                f"rank {dist.get_rank()} and rank {', '.join(map(str, unlike))} train one model with different masks. "
                "Every rank chooses for itself, from what must be the same on all: weights (build the model from one "
                "seed, or wrap it in DistributedDataParallel before sparsify), seed=, and, for scores from data, the "
                "batches (or give sparsify the DistributedDataParallel model: it averages over its replicas)."
            )

    def _read(self, what: str, rank: int) -> str | None:
        key = f"{self.topic}/{what}/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _wait(self, what: str, rank: int) -> str | None:
        try:
            self.store.wait([f"{self.topic}/{what}/{rank}"], _PATIENCE)
        except RuntimeError:  # it does not step with us
            return None
        return self._read(what, rank)


def _digest(tensors: Iterable[Tensor]) -> str:
    """Of the bytes; empty where there is nothing but zeros, which say nothing."""
    found, something = hashlib.sha256(), False
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(torch.uint8)
        something |= bool(flat.any())
        found.update(flat.numpy().tobytes())
    return found.hexdigest() if something else ""


def _masks(sites: Sequence[Site]) -> Iterable[Tensor]:
    for site in sites:
        yield bits.pack(site.mask)
        if site.master is not None:
            yield site.master.reshape(-1)


def _made_from(s: rarefy.core.sparsity.Sparsity) -> str:
    """Counts and generator: what is not gathered, so that it can differ where shards of different masks do."""
    kept = torch.tensor([s.kept(site) for site in s.sites])
    return _digest([kept, s.generator.get_state()])


def _gradient(sites: Sequence[Site]) -> Iterable[Tensor]:
    """Of the first site that the backward pass reached, as it left it."""
    reached = next((site for site in sites if site.parameter.grad is not None), None)
    if reached is not None and reached.parameter.grad is not None:
        dense = reached.held.dense_gradient() if reached.held.wants_dense else reached.parameter.grad
        yield local(dense).reshape(-1)
