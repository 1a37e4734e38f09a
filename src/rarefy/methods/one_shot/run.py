"""One walk through a model for a method that solves matrix by matrix, from its first block to its last.

What is solved is written at once, so that later blocks see it; a journal takes over what is finished.
"""

import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from rarefy.axes import largest_remainder
from rarefy.core import bits
from rarefy.core.capture import walk
from rarefy.core.choose import refuse_infinite, units_of
from rarefy.core.held import local, shard
from rarefy.core.memory import give_back
from rarefy.core.method import Method
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity
from rarefy.methods.one_shot.budgets import Budget, budgets
from rarefy.methods.one_shot.matrix import Matrix, Solved, choose_mask
from rarefy.methods.one_shot.originals import Originals
from rarefy.methods.one_shot.views import from_matrix, line_of, permuted, to_matrix

_MASK = ".mask"  # in a journal, after the name of a weight


def collects_gram(method: Method) -> bool:
    """Whether Σ x xᵀ is needed, here or in the methods within."""
    inner = getattr(method, "method", None)
    return bool(getattr(method, "gram", False)) or (inner is not None and collects_gram(inner))


class Run:
    """One walk through the model. at: the block at work or just finished, for errors."""

    def __init__(self, method: Any, s: Sparsity) -> None:
        self.method, self.s = method, s
        self.at = ""
        self.done: set[Site] = set()
        self.unseen: list[str] = []
        self.double = any(site.parameter.dtype == torch.float64 for site in s.sites)
        self.given: dict[Site, Tensor] = {}
        self.budgets: dict[Site, Budget] = {}

    def all_blocks(self, originals: Originals) -> None:
        for site, mask in self.method.given(self.s).items():
            self.given[site] = self.s.spill(mask)
            self.s.keep(site, self.given[site])
        self.budgets = budgets(self.method, self.s, self.given)
        dtype = (torch.float64 if self.double else torch.float32) if collects_gram(self.method) else None
        finished = self._take_over(originals)
        for captured in walk(self.s.model, self.s.sites, self.s.data, gram=dtype, done=finished):
            self.at = f"block {captured.block.name!r}"
            self._tell(captured.index, captured.of, captured.block.name)
            self._solve_block(captured.statistics, originals)
            self._note(captured.block.name, captured.block.sites)
            self.at = f"after {self.at}"
            if captured.index + 1 == captured.of:
                self._tell(captured.of, captured.of, "")
        for site in self.s.sites:
            if site not in self.done:  # no input ever reached it
                self.at = repr(site.name)
                self._solve_site(site, [None], {}, originals)
        if self.unseen:
            shown = ", ".join(self.unseen[:4]) + (", …" if len(self.unseen) > 4 else "")
            warnings.warn(
                f"no calibration input reached {len(self.unseen)} matrices ({shown}): pruned by magnitude instead. "
                "More calibration text may reach them.",
                stacklevel=2,
            )

    def _take_over(self, originals: Originals) -> list[str]:
        """What the journal holds, of a run that was interrupted: the names of its blocks."""
        journal = self.s.journal
        if journal is None:
            return []
        sites = {site.name: site for site in self.s.sites}
        for block in (finished := journal.done()):
            tensors = journal.load(block)
            for name in [key.removesuffix(_MASK) for key in tensors if key.endswith(_MASK)]:
                site, mask = sites[name], tensors.pop(name + _MASK)
                if self._moves(site):
                    originals.replace(site.parameter, tensors.pop(name))
                    self._keep(site, self.s.spill(mask))
                else:
                    self._put(site, tensors[name], mask, originals)
        return finished

    def _note(self, block: str, sites: Sequence[Site]) -> None:
        if self.s.journal is not None:
            sites = [site for site in sites if site in self.done]
            weights = {site.name: site.parameter.detach() for site in sites}
            masks = {site.name + _MASK: self.s._staged[site.index][0] for site in sites}
            self.s.journal.keep(block, {**weights, **masks})
            if self.s.lean:
                self._let_go(sites, self.s.journal.load(block, masks=False))

    def _let_go(self, sites: Sequence[Site], kept: Mapping[str, Tensor]) -> None:
        """Weights of a finished block become maps of what the journal has, masks maps beside it."""
        for site in filter(self._moves, sites):
            site.parameter.data = kept[site.name]
            self.s.keep(site, self.s.spill(self.s._staged[site.index][0]))

    def _moves(self, site: Site) -> bool:
        """Whether the parameter is given another memory, of which the journal's disk takes care, and not written to."""
        return self.s.lean and site.held.movable()

    def _tell(self, done: int, of: int, name: str) -> None:
        if self.s.progress is not None:
            self.s.progress(done, of, name)

    def _solve_block(self, statistics: dict[Site, list[Any]], originals: Originals) -> None:
        """Sites that read the same inputs follow one another, so that what they share is made once and then let go.

        Takes the statistics out: those of solved sites are freed.
        """
        order = {id(found): i for i, found in enumerate(each for its in statistics.values() for each in its[:1])}
        shared: dict[int, dict[str, Any]] = {}
        for site in sorted(statistics, key=lambda site: [order[id(x)] for x in statistics[site][:1]]):
            its = statistics.pop(site)
            if site in self.done:
                continue
            shared = {id(x): shared.get(id(x), {}) for x in its}
            self._solve_site(site, its, shared, originals)

    def _solve_site(
        self, site: Site, statistics: Sequence[Any], shared: dict[int, dict[str, Any]], originals: Originals
    ) -> None:
        with torch.no_grad():
            solved = self._solve_matrices(site, statistics, shared)
            weight = None if solved.weight is None else from_matrix(site, solved.weight)
            self._put(site, weight, from_matrix(site, solved.mask), originals)

    @torch.no_grad()
    def _put(self, site: Site, weight: Tensor | None, mask: Tensor, originals: Originals) -> None:
        """A mask, and new weights where there are some."""
        if self._moves(site):
            new = (site.parameter if weight is None else weight).detach()
            new = new.to(site.parameter.dtype, copy=True, memory_format=torch.contiguous_format)
            bits.clear_beside_(new, mask)
            originals.replace(site.parameter, new)
        else:
            originals.remember(site.parameter, mask if weight is None else None)
            if weight is not None:
                local(site.parameter).copy_(shard(weight, site.parameter))
            bits.clear_beside_(local(site.parameter), shard(mask, site.parameter))
        self._keep(site, mask)

    def _keep(self, site: Site, mask: Tensor) -> None:
        self.s.keep(site, mask)
        site.asked = bits.count(units_of(site, mask))
        self.done.add(site)

    def _solve_matrices(self, site: Site, statistics: Sequence[Any], shared: dict[int, dict[str, Any]]) -> Solved:
        """Every matrix of the site by itself, joined again."""
        rows = to_matrix(site, site.weight)
        parts = rows.chunk(len(statistics))
        given = to_matrix(site, self.given[site]).chunk(len(statistics)) if site in self.given else [None] * len(parts)
        budget = self.budgets[site]
        kept = _split(budget.keep, [part.numel() for part in parts])
        found: list[Solved] = []
        for index, (part, seen) in enumerate(zip(parts, statistics, strict=True)):
            name = site.name if len(parts) == 1 else f"{site.name}[{index}]"
            if seen is None or not bool(seen.squares.any()):
                self.unseen.append(name)
                found.append(Solved(_by_magnitude(site, part, kept[index], given[index])))
                continue
            weight = part.to(torch.float64 if self.double else torch.float32)
            matrix = Matrix(
                name, weight, permuted(site, seen), site.pattern, kept[index], budget.sparsity, given[index]
            )
            matrix.line, matrix.shared = line_of(site), shared[id(seen)]
            solved = self.method.solve(matrix)
            if len(parts) > 1 and all(each is not seen for each in statistics[index + 1 :]):
                matrix.shared.clear()  # of all experts together it would be what inputs were kept to avoid
                give_back(collect=False)
            if solved.weight is not None:
                solved.weight = solved.weight.to(part.dtype)  # here: of all matrices together they would take much
                refuse_infinite(name, solved.weight, "new weights")
            found.append(solved)
        return _joined(found, parts)


def _split(keep: int, sizes: Sequence[int]) -> list[int]:
    return largest_remainder([Fraction(keep * size, sum(sizes)) for size in sizes], keep, sizes)


def _by_magnitude(site: Site, weight: Tensor, keep: int, mask: Tensor | None) -> Tensor:
    return choose_mask(weight.abs(), site.pattern, keep, Fraction(0), "layer", line_of(site)) if mask is None else mask


def _joined(found: Sequence[Solved], parts: Sequence[Tensor]) -> Solved:
    if len(found) == 1:
        return found[0]
    mask = torch.cat([each.mask for each in found])
    if all(each.weight is None for each in found):
        return Solved(mask)
    weights = [part if each.weight is None else each.weight for each, part in zip(found, parts, strict=True)]
    return Solved(mask, torch.cat(weights))
