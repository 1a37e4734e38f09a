"""The ledger: exact counts at every mask change, and what follows from them about cost.

It holds integers only. FLOPs follow from the counts and from the dense FLOPs of each site (`flops.measure`), by the
convention of RigL's appendix (Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134): 2 per multiply-accumulate,
backward = gradient of the input + gradient of the weight, masked weights free in the forward pass. Per step and sample

    forward f(masks) + input gradient f(masks) + weight gradient f(trainable)

where the input gradient counts dense for straight-through methods, and the weight gradient dense in a step whose dense
gradient was gathered. It is a count of arithmetic, not a time: masked training on stock kernels saves none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FORMULA_ID = "rigl-appendix-2mac"
FORMULA = (
    "2·MAC of Linear and Conv; f(masks) forward + f(masks) input grad + f(trainable) weight grad; norms, bias free"
)


@dataclass
class Entry:
    """Counts that hold from `step` on, per site: kept and trainable weights; `flips`: mask changes since."""

    step: int
    kept: list[int]
    trainable: list[int]
    flips: int = 0


@dataclass
class Ledger:
    """Exact history of one handle. `sizes` = weights per site; `steps` = completed steps, over all rounds.

    >>> ledger = Ledger(["weight"], [100])
    >>> ledger.record(0, [100], [100], flips=0)
    >>> ledger.steps = 10
    >>> ledger.record(10, [20], [20], flips=80)
    >>> ledger.steps = 40
    >>> ledger.average_parameters(), ledger.nonzeros
    (40.0, [(0, 100), (10, 20)])
    """

    names: list[str]
    sizes: list[int]
    dense_backward: bool = False
    steps: int = 0
    entries: list[Entry] = field(default_factory=list[Entry])
    dense_steps: list[int] = field(default_factory=list[int])  # steps whose dense gradient was gathered
    explored_counts: list[int] = field(default_factory=list[int])

    def record(self, step: int, kept: Sequence[int], trainable: Sequence[int], flips: int) -> None:
        """Note the counts after a change of masks; within one step, or where no count moves, no entry is added."""
        kept, trainable = list(kept), list(trainable)
        last = self.entries[-1] if self.entries else None
        if last is not None and last.kept == kept and last.trainable == trainable:
            last.flips += flips
            return
        if last is not None and last.step == step:
            flips += self.entries.pop().flips
        self.entries.append(Entry(step, kept, trainable, flips))

    @property
    def nonzeros(self) -> list[tuple[int, int]]:
        """(step, kept weights over all sites) at every change, repeated counts left out."""
        found: list[tuple[int, int]] = []
        for entry in self.entries:
            if not found or found[-1][1] != sum(entry.kept):
                found.append((entry.step, sum(entry.kept)))
        return found

    @property
    def explored(self) -> float:
        """Share of all weights that were kept at some time (R_s of Liu et al., 2021, arXiv:2102.02887)."""
        return sum(self.explored_counts) / max(1, sum(self.sizes))

    def average_parameters(self) -> float:
        """Kept weights averaged over the completed steps (N̄ of Jin et al., 2025, arXiv:2501.12486)."""
        spans = self._spans()
        if not spans:
            return float(sum(self.entries[-1].kept)) if self.entries else 0.0
        return sum(length * sum(entry.kept) for length, entry in spans) / sum(length for length, _ in spans)

    def flip_rate(self) -> float:
        """Mask entries changed per step, as a share of all weights; the first choice of masks is not a flip."""
        return sum(e.flips for e in self.entries) / (max(1, self.steps) * max(1, sum(self.sizes)))

    def forward_flops(self, measured: Mapping[str, float], at: int = -1) -> float:
        """FLOPs of one forward sample with the masks of entry `at`; `measured` as `flops.measure` returns it."""
        return self._rest(measured) + self._sparse(self.entries[at].kept, measured)

    def training_flops(self, measured: Mapping[str, float], samples: int = 1) -> float:
        """FLOPs of all completed steps with `samples` samples a step, by the convention above."""
        dense = self._rest(measured) + self._sparse(self.sizes, measured)
        total, begin = 0.0, 0
        for length, entry in self._spans():
            forward = self._rest(measured) + self._sparse(entry.kept, measured)
            weight = self._rest(measured) + self._sparse(entry.trainable, measured)
            gathered = sum(begin <= step < begin + length for step in self.dense_steps)
            total += length * (forward + (dense if self.dense_backward else forward))
            total += (length - gathered) * weight + gathered * dense
            begin += length
        return total * samples

    def _spans(self) -> list[tuple[int, Entry]]:
        """(number of steps, entry that held during them)."""
        edges = [0, *(min(e.step, self.steps) for e in self.entries[1:]), self.steps]
        return [(b - a, e) for e, a, b in zip(self.entries, edges, edges[1:], strict=False) if b > a]

    def _sparse(self, counts: Sequence[int], measured: Mapping[str, float]) -> float:
        return sum(measured.get(n, 0.0) * k / size for n, k, size in zip(self.names, counts, self.sizes, strict=True))

    def _rest(self, measured: Mapping[str, float]) -> float:
        """Layers that are no sites."""
        sites = set(self.names)
        return sum(f for name, f in measured.items() if name not in sites)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.entries = [Entry(**entry) for entry in state["entries"]]
        self.dense_steps = list(state["dense_steps"])
        self.explored_counts = list(state["explored_counts"])


def rigl_training_flops(sparse: float, dense: float, every: int) -> float:
    """Training FLOPs of RigL per sample and step, over ΔT steps and one update: (3 f_S ΔT + 2 f_S + f_D)/(ΔT + 1).

    >>> round(rigl_training_flops(0.2, 1.0, 100) / 3, 4)
    0.2026
    """
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)
