"""`report(model)`: what is sparse, site by site, as a table for people and a dictionary for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from rarefy.core import bits, flops, ledger
from rarefy.core.held import full
from rarefy.core.live import live_handle
from rarefy.core.sites import Selector, find_sites
from rarefy.core.sparse.linear import SparseLinear
from rarefy.core.sparsity import Sparsity

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass
class Row:
    """One site. `kept`: weights under the mask, or non-zero weights where no handle is known."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    weights: int
    kept: int
    flops: float | None = None

    @property
    def density(self) -> float:
        return self.kept / self.weights


@dataclass
class Report:
    """Print it with rich for the table; `to_dict()` for JSON; `str()` for plain text."""

    rows: list[Row]
    parameters: int
    nonzero_parameters: int
    source: str
    dense_flops: float | None = None
    sparse_flops: float | None = None
    formula: str = field(default=ledger.FORMULA)

    @property
    def kept(self) -> int:
        return sum(row.kept for row in self.rows)

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.rows)

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / max(1, self.weights)

    def to_dict(self) -> dict[str, Any]:
        totals = {"kept": self.kept, "weights": self.weights, "sparsity": self.sparsity}
        return {**asdict(self), "totals": totals}

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{row.name:<{width}}  {_shape(row.shape):>16}  {row.pattern:<14}"
            f"{row.kept:>10} of {row.weights:<10} {row.density:7.2%}"
            for row in self.rows
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line of totals."""
        text = (
            f"{self.kept:,} of {self.weights:,} prunable weights kept (sparsity {self.sparsity:.2%}); "
            f"{self.nonzero_parameters:,} of {self.parameters:,} parameters non-zero; {self.source}"
        )
        if self.sparse_flops is None or not self.dense_flops:
            return text
        return f"{text}; forward {self.sparse_flops:.3g} of {self.dense_flops:.3g} FLOPs a sample ({self.formula})"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table(caption=self.summary(), caption_justify="left", box=None, header_style="bold")
        for title in ("site", "kind", "shape", "pattern", "kept", "weights", "density", "FLOPs"):
            table.add_column(title, justify="left" if title in {"site", "kind", "pattern"} else "right")
        for row in self.rows:
            cost = "–" if row.flops is None else f"{row.flops * row.density:.3g}"
            cells = (row.name, row.kind, _shape(row.shape), row.pattern, f"{row.kept:,}", f"{row.weights:,}")
            table.add_row(*cells, f"{row.density:.2%}", cost)
        yield table


def report(
    model: nn.Module,
    sparsity: Sparsity | None = None,
    *,
    example: Any = None,
    only: Selector | list[Selector] | None = None,
    skip: Selector | list[Selector] | None = None,
) -> Report:
    """Per site: shape, pattern, kept weights, density; totals; with an example batch, forward FLOPs too.

    Counts come from the masks of the handle given, else of the live handle on the model; without any they are counts of
    non-zero values, and the report says so.

    >>> print(report(nn.Linear(2, 2)).kept)
    4
    """
    sparsity = sparsity or live_handle(model)
    sites = list(sparsity.sites) if sparsity is not None else find_sites(model, only=only, skip=skip)
    measured = flops.measure(model, example) if example is not None else {}
    rows = [
        Row(
            site.name,
            site.kind,
            site.stored_shape,
            str(site.pattern) if sparsity is not None else "–",
            site.numel,
            sparsity.kept(site) if sparsity is not None else _nonzero(site.parameter),
            measured.get(site.name),
        )
        for site in sites
    ]
    found = Report(
        rows,
        sum(p.numel() for p in model.parameters()) + sum(_absent(module) for module in model.modules()),
        sum(_nonzero(p) for p in model.parameters()),
        "counted from masks" if sparsity is not None else "counted from values: no handle is known for this model",
    )
    if measured:
        found.dense_flops = sum(measured.values())
        found.sparse_flops = found.dense_flops - sum((r.flops or 0.0) * (1 - r.density) for r in rows)
    return found


def _absent(module: nn.Module) -> int:
    """Weights that a layer under sparse execution does without."""
    if not isinstance(module, SparseLinear):
        return 0
    return module.structure.rows * module.structure.cols - module.values.numel()


def _nonzero(parameter: nn.Parameter) -> int:
    return bits.count(full(parameter).detach().ne(0))


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
