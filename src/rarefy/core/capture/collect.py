"""From what is observed to statistics: one accumulator for every set of rows, shared by those that read one tensor.

Only inputs are asked for, so that a block's last product need not be carried out. Which one is the last is learnt from
the first run; should a later run go another way, the pass starts anew without this.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from rarefy.core.capture.operands import Rows
from rarefy.core.capture.statistics import Accumulator, Statistics
from rarefy.core.capture.store import Store
from rarefy.core.sites import Site

_RECENT = 4  # inputs remembered, so that the next matrices that read the same one are recognised
_HELD = 1.5  # Gram matrices added up as inputs come, in entries of the widest one; of the others inputs are kept


class Again(BaseException):
    """The pass must start anew, with what is now `Known`. No model may catch it."""


@dataclass
class Known:
    """What earlier passes told of a block. separate: rows that do not share inputs, though they seemed to at first.
    whole: that its runs cannot be cut short."""

    separate: set[Rows] = field(default_factory=set[Rows])
    whole: bool = False


@dataclass
class _Slot:
    accumulator: Accumulator
    leader: Rows
    calls: int = 0


@dataclass
class _Input:
    tensor: Tensor  # held, so that its memory is not used again meanwhile
    version: int
    recipe: object
    leader: Rows

    def is_read_by(self, source: Tensor, recipe: object) -> bool:
        kept = self.tensor
        if recipe != self.recipe or source.shape != kept.shape or source.dtype != kept.dtype:
            return False
        if kept._version != self.version:
            return False
        if (source.data_ptr(), source.stride()) == (kept.data_ptr(), kept.stride()):
            return True
        return bool(torch.equal(source[:1], kept[:1])) and bool(torch.equal(source, kept))


class Collector:
    """A sink of the Observer, for the inputs of `sites`. `known` grows when `Again` is raised.

    store: keeps inputs where Gram matrices would take more memory than a solver does; None: all are held.
    """

    def __init__(
        self, gram: torch.dtype | None, sites: Sequence[Site], known: Known, store: Store | None = None
    ) -> None:
        self.gram, self._store = gram, store
        self._left = _HELD * max((site.numel // site.shape[0] for site in sites), default=0) ** 2
        self.sequences = 1
        self._sites, self._known = sites, known
        self._slots: dict[Rows, _Slot] = {}
        self._recent: deque[_Input] = deque(maxlen=_RECENT)
        self._reached = 0  # in this run
        self._all = math.inf if known.whole else 0  # how often in a run; 0 before the first one
        self._cut = False

    def begin(self, sequences: int) -> None:
        """A run begins, with a batch of so many sequences."""
        self.sequences = sequences
        self._reached, self._cut = 0, False
        self._recent.clear()

    def end(self) -> None:
        """A run is over. Raises Again when rows that share were not called as often as each other."""
        self._recent.clear()
        for rows, slot in self._slots.items():
            if slot.calls != self._slots[slot.leader].calls:
                self._unshare(rows)
        if not self._all:
            once = all(slot.calls == 1 for slot in self._slots.values()) and all(map(self.seen, self._sites))
            self._all = len(self._slots) if once else math.inf

    def over(self) -> bool:
        """See Sink."""
        self._cut = self._cut or self._reached >= self._all > 0
        return self._cut

    def failed(self) -> None:
        """A run ended in an exception. Raises Again where that may come from its being cut short."""
        if self._cut:
            self._run_whole()

    def _count(self) -> None:
        if self._cut:  # what comes now was computed from what is not there
            self._run_whole()
        self._reached += 1

    def _run_whole(self) -> None:
        self._known.whole = True
        raise Again

    def take(self, rows: Rows, source: Tensor, recipe: object, make: Callable[[], Iterator[Tensor]]) -> None:
        """See Sink."""
        self._count()
        twin = next((i.leader for i in self._recent if i.is_read_by(source, recipe)), None)
        slot = self._slots.get(rows)
        if slot is None:
            slot = self._slots[rows] = self._new_slot(rows, recipe, source, twin)
        slot.calls += 1
        if slot.leader != rows:
            if twin != slot.leader:
                self._unshare(rows)
            return
        for x in make():
            slot.accumulator.add(self._by_sequence(rows.site, x))
        self._recent.append(_Input(source, source._version, recipe, rows))

    def reached(self, rows: Rows) -> None:
        """See Sink. No token is no statistics."""
        self._count()

    def _new_slot(self, rows: Rows, recipe: object, source: Tensor, twin: Rows | None) -> _Slot:
        if twin is not None and rows not in self._known.separate and self._slots[twin].calls == 1:
            return _Slot(self._slots[twin].accumulator, twin)
        groups = getattr(recipe, "groups", None)
        store = self._store_for((groups or 1) * rows.width**2, convolution=groups is not None)
        made = Accumulator(rows.width, matrices=groups or 1, gram=self.gram, device=source.device, store=store)
        return _Slot(made, rows)

    def _store_for(self, entries: int, *, convolution: bool) -> Store | None:
        """Where inputs are kept instead of Gram matrices of so many entries; None: there is room to hold these.

        A convolution's inputs, each many times in its rows, would take more than what is saved.
        """
        if entries > self._left and not convolution:
            return self._store
        self._left -= entries
        return None

    def _by_sequence(self, site: Site, x: Tensor) -> Tensor:
        """Tokens as (sequences, tokens of each, ...): experts see tokens of all sequences mixed."""
        if x.ndim > 2:
            return x
        known = not site.layout.stacked and len(x) % self.sequences == 0
        return cast(Any, x).unflatten(0, (self.sequences, -1)) if known else x[None]

    def _unshare(self, rows: Rows) -> None:
        self._known.separate.add(rows)
        raise Again

    def seen(self, site: Site) -> bool:
        """Whether any input of the site was observed."""
        return any(rows.site is site for rows in self._slots)

    def finish(self) -> dict[Site, list[Statistics]]:
        """For each site the statistics of its matrices: equal shares of its rows; one object where they share.

        A matrix that saw no token has tokens = 0 and no gram. Raises ValueError for NaN or infinite inputs.
        """
        results: dict[int, list[Statistics]] = {}
        for rows, slot in self._slots.items():
            if id(slot.accumulator) not in results:
                slot.accumulator.refuse_infinite(rows.site.name)
                results[id(slot.accumulator)] = slot.accumulator.result()
        found: dict[Site, list[Statistics]] = {}
        for site in self._sites:
            slots = {rows: results[id(s.accumulator)] for rows, s in self._slots.items() if rows.site is site}
            found[site] = _of_site(site, slots)
        self._slots.clear()
        return found


def _of_site(site: Site, slots: dict[Rows, list[Statistics]]) -> list[Statistics]:
    total = site.shape[0]
    unit = total // max(1, site.layout.stacked)
    for rows, parts in slots.items():
        unit = math.gcd(unit, rows.start, (rows.stop - rows.start) // len(parts))
    found: list[Statistics] = []
    for start in range(0, total, unit):
        covering = [
            parts[(start - rows.start) * len(parts) // (rows.stop - rows.start)]
            for rows, parts in slots.items()
            if rows.start <= start < rows.stop
        ]
        found.append(_together(covering, site))
    return found


def _together(parts: Sequence[Statistics], site: Site) -> Statistics:
    """One part as it is; of several the sum; of none, nothing."""
    if len(parts) == 1:
        return parts[0]
    zero = torch.zeros(3, site.numel // site.shape[0], dtype=torch.float64, device=site.parameter.device)
    found, grams = Statistics(0, 0, *zero.unbind()), [gram for part in parts if (gram := part.gram) is not None]
    found.outer = sum(grams[1:], grams[0]) if grams else None
    for part in parts:
        found.tokens += part.tokens
        found.sequences += part.sequences
        for own, other in ((found.squares, part.squares), (found.sums, part.sums), (found.within, part.within)):
            own += other
    return found
