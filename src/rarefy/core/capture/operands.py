"""Which rows of which weight a tensor is: operands of products recognised as views of watched parameters.

A weight may reach a product transposed, cut (the three parts of a packed attention projection), taken out of a stack
(one expert), or as a copy in another dtype (autocast). Views are known by their address and strides; copies that the
cast operation made are followed for as long as they live.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rarefy.core.sites import Site


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a site's canonical (out, in) matrix, whole: every input of them."""

    site: Site
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.site.numel // self.site.shape[0]


@dataclass(frozen=True)
class _Copy:
    storage: Any  # a weak reference: a copy that is gone leaves its address to others
    address: int
    size: int
    stride: tuple[int, ...]
    origin: Tensor  # the view of the parameter that was copied
    site: Site
    picks: Tensor | None  # [length of the copy]: which entries of the origin's first axis it holds; None: the same


class Operands:
    """Recognises views of the parameters of `sites`."""

    def __init__(self, sites: Iterable[Site]) -> None:
        known = sorted(((s.parameter.data_ptr(), i, s) for i, s in enumerate(sites)), key=lambda k: k[:2])
        self._sites = [site for _, _, site in known]
        self._starts = [start for start, _, _ in known]
        self._copies: list[_Copy] = []

    def holds(self, t: Any) -> bool:
        """Whether the tensor lies in a watched parameter or in a living copy of one."""
        return isinstance(t, Tensor) and self._site(t) is not None

    def rows(self, t: Tensor, contracted: int, kept: int) -> Rows | None:
        """What `t` holds; None when it is no part of a watched weight. contracted, kept: its axes in the product.

        Raises ValueError when the product sums over anything but all inputs of the rows.
        """
        site = self._site(t)
        if site is None:
            return None
        p = site.parameter
        if not _within(t, p):
            t = self._translated(t)
        return _read(site, t, contracted, kept, (t.data_ptr() - p.data_ptr()) // p.element_size())

    def whole(self, t: Tensor) -> Rows:
        """All rows of the weight that `t` is or is copied from."""
        site = self._site(t)
        assert site is not None
        return Rows(site, 0, site.shape[0])

    def follow(self, source: Any, copy: Any, picks: Tensor | None = None) -> None:
        """Remember that an operation made `copy` of `source` in the same order (of the matrices that it picked)."""
        site = self._site(source) if isinstance(source, Tensor) else None
        first = 0 if picks is None else 1
        if site is None or not isinstance(copy, Tensor) or copy.stride()[first:] != source.stride()[first:]:
            return
        origin = source if _within(source, site.parameter) else self._translated(source)
        self._copies = [c for c in self._copies if not c.storage.expired()]
        size = copy.untyped_storage().nbytes()
        kept = StorageWeakRef(copy.untyped_storage())
        self._copies.append(_Copy(kept, copy.data_ptr(), size, tuple(copy.stride()), origin.detach(), site, picks))

    def gathered(self, t: Tensor) -> Tensor | None:
        """Which matrix each entry of `t` holds, where it is a copy of some picked from a stack (a token's expert)."""
        copy = self._copy(t) if self._copies else None
        whole = copy is not None and copy.picks is not None and len(t) == len(copy.picks)
        return copy.picks if copy is not None and whole else None

    def _site(self, t: Tensor) -> Site | None:
        if t.is_meta or t.is_sparse:
            return None
        index = bisect.bisect_right(self._starts, t.data_ptr()) - 1
        if index >= 0 and _within(t, self._sites[index].parameter):
            return self._sites[index]
        copy = self._copy(t)
        return None if copy is None else copy.site

    def _copy(self, t: Tensor) -> _Copy | None:
        address = t.data_ptr()
        for copy in reversed(self._copies):
            if copy.address <= address < copy.address + copy.size and not copy.storage.expired():
                return copy
        return None

    def _translated(self, t: Tensor) -> Tensor:
        """The view of the parameter at the place that `t` has in a copy."""
        copy = self._copy(t)
        assert copy is not None
        offset = (t.data_ptr() - copy.address) // t.element_size()
        if copy.picks is not None:
            entry, offset = divmod(offset, copy.stride[0])
            offset += int(copy.picks[entry]) * copy.origin.stride(0)
        return copy.origin.as_strided(t.shape, t.stride(), offset + copy.origin.storage_offset())


def _within(t: Tensor, p: Tensor) -> bool:
    start = p.data_ptr()
    return t.dtype == p.dtype and start <= t.data_ptr() < start + p.numel() * p.element_size()


def _read(site: Site, t: Tensor, contracted: int, kept: int, offset: int) -> Rows:
    layout, p, rows = site.layout, site.parameter, site.shape[0]
    width = site.numel // rows
    row_stride, column_stride = _strides(site)
    each = rows // max(1, layout.stacked)
    stack_stride = p.stride(0) if layout.stacked else 0
    matrix, offset = divmod(offset, stack_stride) if layout.stacked else (0, offset)
    row, column = _place(offset, (row_stride, each), (column_stride, width))
    whole = t.shape[contracted] == width and (width == 1 or t.stride(contracted) == column_stride)
    step = row_stride if t.shape[kept] == 1 else t.stride(kept)
    if not whole or column:
        swapped = t.shape[contracted] > 1 and t.stride(contracted) == row_stride
        raise ValueError(_contradiction(site, t, contracted, swapped))
    start = matrix * each + row
    return Rows(site, start, min(rows, start + (t.shape[kept] - 1) * max(1, step // row_stride) + 1))


def _strides(site: Site) -> tuple[int, int]:
    """Of the rows and of the columns of a matrix, in the weight as it is stored."""
    p = site.parameter.detach()
    if site.layout.transposed:
        return p.stride(-1), p.stride(-2)
    flat = p if site.layout.stacked else p.flatten(1)  # a kernel of one place may have any strides of its own
    return flat.stride(-2), flat.stride(-1)


def _place(offset: int, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, int]:
    """Row and column at an offset; each axis is (stride, length). An axis of length 1 may have any stride."""
    if rows[1] > 1 and (columns[1] == 1 or rows[0] >= columns[0]):
        row, rest = divmod(offset, rows[0])
        return row, rest // columns[0] if columns[1] > 1 else 0
    column, rest = divmod(offset, columns[0]) if columns[1] > 1 else (0, offset)
    return (rest // rows[0] if rows[1] > 1 else 0), column


def _contradiction(site: Site, t: Tensor, contracted: int, swapped: bool) -> str:
    width = site.numel // site.shape[0]
    read = f"{site.name!r} is stored as {site.stored_shape} and read as (out, in) = {(site.shape[0], width)}"
    if swapped:
        return (
            f"{read}, but the model sums over its outputs ({t.shape[contracted]} of them): it is stored the other way "
            f"round. Give its module is_transposed = {not site.layout.transposed}, or skip={site.name!r}."
        )
    return (
        f"{read}, but a product uses {t.shape[contracted]} entries a row, so its inputs do not arrive together: "
        f"skip={site.name!r}, or take a method without data (Magnitude)."
    )
