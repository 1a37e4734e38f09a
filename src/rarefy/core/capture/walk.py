"""Block by block through a model: statistics of a block's inputs, made by the blocks before it as they are by then.

    for captured in walk(model, sites, data, gram=torch.float32):
        ...  # change the weights of captured.block by captured.statistics

Between two blocks the present one is run again, so that the next sees what its changes made of the activations. Blocks
of a chain are replayed by themselves where that is possible, bit for bit; elsewhere the whole model runs for each block
and stops after it: slower, and right everywhere. `Captured.fallback` says which, and why.

Memory beside the model's: the activations between two blocks, once (in files beyond a limit); what one block needs for
one batch; and the statistics of one block. If Gram matrices are asked for, those are K² entries for each tensor of K
features that its sites read, up to one and a half times the widest one's; of what else is read (every expert reads two
tensors of its own) the inputs are kept, in files beyond that limit, and a Gram matrix is made when it is used.
Convolutions always hold theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.core.capture.batches import Batch, Calibration
from rarefy.core.capture.blocks import Block, Chain, chains_of
from rarefy.core.capture.collect import Again, Collector, Known
from rarefy.core.capture.observe import Observer
from rarefy.core.capture.operands import Operands
from rarefy.core.capture.record import Refused
from rarefy.core.capture.replay import Replay
from rarefy.core.capture.runs import quiet, run
from rarefy.core.capture.statistics import Statistics
from rarefy.core.capture.store import Store
from rarefy.core.capture.unseen import Order, Ran
from rarefy.core.memory import give_back
from rarefy.core.sites import Site

Progress = Callable[[str, int, int], None]
"""progress(what is being done, batches done, batches in all)."""


@dataclass
class Captured:
    """A block whose inputs are known. It may be changed until the next one is asked for, when statistics are freed.

    statistics: for each site those of its matrices, which are equal shares of the rows of its canonical (out, in): one
    for an ordinary layer, one an expert, one a group of a convolution, in order. Matrices that read the same tensor
    have the same object. index, of: which of how many blocks. fallback: why the whole model was run, "" for a replay.
    """

    block: Block
    statistics: dict[Site, list[Statistics]]
    index: int
    of: int
    fallback: str = ""

    def matrices(self, site: Site) -> list[tuple[slice, Statistics]]:
        """Rows of the canonical matrix, `site.layout.canonical(w).flatten(1)`, each part with its statistics."""
        found = self.statistics[site]
        rows = site.shape[0] // len(found)
        return [(slice(i * rows, (i + 1) * rows), each) for i, each in enumerate(found)]


def walk(
    model: nn.Module,
    sites: Sequence[Site],
    data: Iterable[Any] | Calibration,
    *,
    blocks: str | Iterable[str] | None = None,
    gram: torch.dtype | None = None,
    done: Collection[str] = (),
    progress: Progress | None = None,
    spill_above: int = 1 << 26,
    folder: Path | None = None,
) -> Iterator[Captured]:
    """Blocks in the order in which they run, with statistics of the inputs that their sites see at that time.

    Args:
        data: batches as the model takes them (see `Calibration.of`), or what `Calibration.of` made of them.
        blocks: see `blocks_of`. gram: dtype of the Gram matrices, None for moments alone.
        done: names of blocks that an earlier, interrupted walk has finished: run, but not captured again.
        spill_above: bytes of activations kept in memory; the others go to files in a temporary folder within `folder`.

    The model is left as it was, but for what the caller changes. Raises ValueError for a site whose inputs cannot be
    seen, and for NaN or infinite inputs. Experts that no token reached have tokens = 0.
    """
    calibration = Calibration.of(model, data)
    state = _Walk(model, calibration.batches, gram, progress or _silent)
    chains = state.in_running_order(chains_of(model, sites, blocks))
    wanted = {b: i for i, b in enumerate(b for c in chains for b in c.blocks if b.sites and b.name not in done)}
    for chain in chains:
        with Store(spill_above, folder) as store:
            yield from state.chain(chain, wanted, store)


def dense_statistics(
    model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | Calibration, *, progress: Progress | None = None
) -> dict[Site, list[Statistics]]:
    """Moments (no Gram matrix) of the inputs of all sites in the model as it is, by one run over the data."""
    calibration = Calibration.of(model, data)
    state = _Walk(model, calibration.batches, None, progress or _silent)
    whole = Block("the model", model, tuple(sites))
    return state.collect(whole, lambda batch: run(model, calibration.batches[batch]))


def _silent(what: str, done: int, of: int) -> None:
    pass


@dataclass
class _Walk:
    model: nn.Module
    batches: Sequence[Batch]
    gram: torch.dtype | None
    progress: Progress
    over_after: set[Block] = field(default_factory=set[Block])

    def in_running_order(self, chains: Sequence[Chain]) -> list[Chain]:
        """By the first product with one of their weights in a run of the first batch; those without one come last."""
        blocks = [block for chain in chains for block in chain.blocks if block.sites]
        order = Order(block.module for block in blocks)
        with quiet(self.model), order, Observer(Operands(s for block in blocks for s in block.sites), order):
            run(self.model, self.batches[0])
        self.over_after = {block for block in blocks if order.over_after(block)}
        return sorted(chains, key=lambda chain: min(order.first.get(site, math.inf) for site in chain.sites))

    def chain(self, chain: Chain, wanted: dict[Block, int], store: Store) -> Iterator[Captured]:
        pending = [i for i, block in enumerate(chain.blocks) if block in wanted]
        if not pending:
            return
        replay, reason = self._replay(chain, store)
        for index, block in enumerate(chain.blocks[: pending[-1] + 1]):
            give_back(collect=False)
            if block in wanted:
                run_batch = self._run_whole(block) if replay is None else _run_block(replay, index)
                captured = Captured(block, self.collect(block, run_batch, store), wanted[block], len(wanted), reason)
                yield captured
                captured.statistics.clear()
            if replay is not None and index < pending[-1]:
                give_back(collect=False)  # before many runs again: their short-lived tensors leave holes among others
                replay.advance(index, self._teller(f"{block.name}: running it as it is now"))

    def _replay(self, chain: Chain, store: Store) -> tuple[Replay | None, str]:
        if not chain.repeated or len(chain.blocks) == 1:
            return None, "it is not one of several blocks"
        self.progress(f"{chain.blocks[0].name}: recording how blocks are called", 0, len(self.batches))
        try:
            return Replay(self.model, chain.blocks, self.batches, store), ""
        except Refused as refused:
            store.close()
            return None, str(refused)

    def _run_whole(self, block: Block) -> Callable[[int], None]:
        until = block.module if block in self.over_after else None
        return lambda batch: run(self.model, self.batches[batch], until)

    def collect(
        self, block: Block, run_batch: Callable[[int], None], store: Store | None = None
    ) -> dict[Site, list[Statistics]]:
        """Statistics of the block's sites of a run of all batches; again where the first one misled.

        store: for inputs whose Gram matrices would be too many to hold.
        """
        known = Known()
        while True:
            collector = Collector(self.gram, block.sites, known, store)
            try:
                ran = self._observe(block, collector, run_batch)
            except Again:
                continue
            for site in block.sites:
                if not collector.seen(site):
                    ran.refuse_unseen(site)
            return collector.finish()

    def _observe(self, block: Block, collector: Collector, run_batch: Callable[[int], None]) -> Ran:
        tell = self._teller(f"{block.name}: inputs")
        ran, operands = Ran(block.module), Operands(block.sites)
        with quiet(self.model), ran, Observer(operands, collector):
            for index, batch in enumerate(self.batches):
                collector.begin(batch.sequences)
                try:
                    run_batch(index)
                except Exception:
                    collector.failed()
                    raise
                collector.end()
                tell(index)
        return ran

    def _teller(self, what: str) -> Callable[[int], None]:
        return lambda batch: self.progress(what, batch + 1, len(self.batches))


def _run_block(replay: Replay, index: int) -> Callable[[int], None]:
    return lambda batch: replay.run(index, batch)
