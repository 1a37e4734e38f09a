"""What pruning a directory did: sites of one kind together, and the record that is written beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.core import choose
from rarefy.core.method import Method
from rarefy.core.sites import Site
from rarefy.io.calibration import Calibration

__all__ = ["Kind", "Pruned", "asked_of", "by_kind", "innermost", "kind_of", "planned", "used_of"]


@dataclass(frozen=True)
class Kind:
    """Sites of one kind, such as all `self_attn.q_proj`: how many, their weights, weights asked for, weights kept.

    asked: None where the method decides it (allocations by score, until it has run).
    """

    name: str
    sites: int
    weights: int
    asked: int | None
    kept: int | None


@dataclass(frozen=True)
class Pruned:
    """What `prune` did. parameters, nonzero: of the whole model. out: None for a dry run, where kept is None too."""

    source: Path
    out: Path | None
    method: dict[str, Any]
    pattern: str
    kinds: tuple[Kind, ...]
    parameters: int
    nonzero: int | None
    calibration: dict[str, Any] | None
    seconds: float

    @property
    def weights(self) -> int:
        """Of all pruned layers."""
        return sum(kind.weights for kind in self.kinds)

    @property
    def kept(self) -> int | None:
        """Of them."""
        known = [kind.kept for kind in self.kinds if kind.kept is not None]
        return sum(known) if len(known) == len(self.kinds) else None

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that was asked for; None where the pattern or the layers have their own."""
        method = self.method
        while isinstance(method.get("method"), dict):
            method = method["method"]
        own = ":" in self.pattern or (method.get("allocation") or {}).get("kind") == "PerLayer"
        return None if own else method.get("sparsity")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with totals."""
        found = dataclasses.asdict(self)
        sparsity = None if self.kept is None else 1 - self.kept / self.weights
        totals = {"weights": self.weights, "kept": self.kept, "sparsity": sparsity}
        return {
            **found,
            "source": str(self.source),
            "out": None if self.out is None else str(self.out),
            "totals": totals,
        }


def innermost(method: Any) -> Any:
    """The method that chooses the first masks, within those that refine them (`Refit(method=Wanda(0.5))`)."""
    while isinstance(getattr(method, "method", None), Method):
        method = method.method
    return method


def planned(sites: list[Site], method: Any) -> tuple[Kind, ...]:
    """For a dry run: what each site is asked to keep, where that does not depend on scores."""
    method = innermost(method)
    pattern: Any = getattr(method, "pattern", None)
    allocation: Any = getattr(method, "allocation", None)
    for site in sites:
        if pattern is not None:
            site.pattern = pattern
            if reason := pattern.fits(site.pattern_shape):
                raise ValueError(f"{site.name!r}: {reason}")
    counts: dict[Site, int] = {}
    if pattern is not None and allocation is not None and _known(pattern, allocation):
        counts = choose.allocate(sites, allocation, method.sparsity, None)
    for site in sites:
        site.asked = counts.get(site)
    return by_kind([(site, asked_of(site), None) for site in sites])


def _known(pattern: Any, allocation: Any) -> bool:
    """Whether counts follow from shapes alone, not from scores or inputs."""
    return not allocation.needs_inputs and (pattern.fixed or not allocation.needs_scores)


def asked_of(site: Site) -> int | None:
    """Weights that a site was asked to keep."""
    if site.asked is None:
        return None
    return round(site.asked * site.numel / site.pattern.units(site.pattern_shape))


def kind_of(name: str) -> str:
    """The name of a weight without its place among the blocks.

    >>> kind_of("model.layers.11.mlp.experts.3.w1.weight")
    'mlp.experts.*.w1'
    """
    parts = name.removesuffix(".weight").split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def by_kind(rows: Iterable[tuple[Site, int | None, int | None]]) -> tuple[Kind, ...]:
    """Sites with the weights that they were asked to keep and keep, summed over those of one kind."""
    groups: dict[str, list[tuple[Site, int | None, int | None]]] = {}
    for row in rows:
        groups.setdefault(kind_of(row[0].name), []).append(row)
    return tuple(
        Kind(name, len(g), sum(s.numel for s, _, _ in g), _total(a for _, a, _ in g), _total(k for _, _, k in g))
        for name, g in groups.items()
    )


def _total(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if any(count is None for count in known) else sum(count for count in known if count is not None)


def used_of(data: Calibration | None) -> dict[str, Any] | None:
    """The settings of calibration data, with their hash."""
    return None if data is None else {**data.settings, "sha256": data.sha256}
