"""Exactly k of n: choosing units by score, and the whole numbers that say how many.

Everything here is exact and the same on every machine: a threshold is only ever a means, ties go to the lower index,
and counts are rational arithmetic on the decimal that was written.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SAMPLE = 4096
_CACHED = 1 << 17  # scores at a time: what is made of them stays in the caches


def top_k(scores: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """Keep the k largest scores; ties go to the lower index.

    scores: any shape and floating dtype, finite. k: 0 ≤ k ≤ number of candidates.
    among: bool, same shape: the candidates; others are never kept and their scores never read. Default: all.
    Returns a bool mask of the same shape with exactly k true entries.
    Raises ValueError on NaN or infinity among the candidates and on an impossible k.

    >>> top_k(torch.tensor([1., 3., 3., 2.]), 2)
    tensor([False,  True,  True, False])
    >>> top_k(torch.tensor([1., 3., 3., 2.]), 2, among=torch.tensor([True, False, True, True]))
    tensor([False, False,  True,  True])
    """
    flat = scores.reshape(-1)
    candidates = None if among is None else _true_places(_same_shape(among, scores))
    most = flat.numel() if candidates is None else candidates.numel()
    if not 0 <= k <= most:
        raise ValueError(f"top_k: asked for {k} of {most} candidates; k must be from 0 to {most}")
    if candidates is None:
        return _largest(ready(flat), k).reshape(scores.shape)
    return _gathered(ready(flat.index_select(0, candidates)), k, candidates, flat.numel()).reshape(scores.shape)


def _largest(scores: Tensor, k: int) -> Tensor:
    """`top_k` of a vector."""
    if 2 * k > scores.numel():  # the others are fewer: the smallest, of equal ones those at the end
        return ~_largest(-scores.flip(0), scores.numel() - k).flip(0)
    places = _likely(scores, k)
    if places is None:
        return top_k_per_row(scores.reshape(1, -1), k).reshape(-1)
    return _gathered(scores.index_select(0, places), k, places, scores.numel())


def _gathered(scores: Tensor, k: int, places: Tensor, length: int) -> Tensor:
    """`top_k` of a vector of which only the scores at `places` count: these ascend, so ties go to the lower index."""
    mask = torch.zeros(length, dtype=torch.bool, device=scores.device)
    mask[places.index_select(0, _true_places(_largest(scores, k)))] = True
    return mask


def _likely(scores: Tensor, k: int) -> Tensor | None:
    """Places that surely hold the k largest, if few do: those above a bound read off a sample. None to take all.

    Selecting among a tenth of the scores costs a fraction of selecting among all of them; the choice stays exact,
    because the bound is used only if at least k scores reach it, and all that reach it are candidates.
    """
    share = k / max(1, scores.numel())
    sample = scores[:: max(1, scores.numel() // _SAMPLE)]
    wanted = int(len(sample) * share + 5 * math.sqrt(len(sample) * share) + 8)
    if scores.numel() < 8 * _SAMPLE or k == 0 or 2 * wanted > len(sample):
        return None
    places = _true_places(_reach(scores, sample.topk(wanted, sorted=False).values.amin()))
    return places if k <= len(places) <= scores.numel() // 2 else None


def _reach(scores: Tensor, bound: Tensor) -> Tensor:
    """scores >= bound; numpy's comparison is vectorised where torch's, with a boolean result, is not."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64, torch.float16):
        return from_array(np.greater_equal(scores.numpy(), bound.numpy()))
    return scores >= bound


def from_array(array: NDArray[Any]) -> Tensor:
    """`torch.from_numpy`, with a type: a tensor on the array's memory."""
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def _true_places(mask: Tensor) -> Tensor:
    """Flat indices of the true entries, ascending."""
    if mask.device.type == "cpu":
        return from_array(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def top_k_per_row(scores: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row; ties go to the lower index.

    scores: (rows, columns), floating, no NaN; infinities sort at the ends. k: 0 ≤ k ≤ columns.
    Returns a bool mask (rows, columns) with exactly k true entries in each row.

    >>> top_k_per_row(torch.tensor([[0., 0., 0.], [1., 2., 3.]]), 1).int()
    tensor([[1, 0, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    if k == 0 or not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type != "cpu":
        return _top_of_rows(scores, k)
    mask = torch.empty(scores.shape, dtype=torch.bool)
    rows = max(1, _CACHED // scores.shape[1])
    scores = scores.detach()
    for row in range(0, len(scores), rows):
        mask[row : row + rows] = _top_of_rows(scores[row : row + rows], k)
    return mask


def _top_of_rows(scores: Tensor, k: int) -> Tensor:
    threshold = _kth(scores, k)
    kept = _reach(scores, threshold)
    if int(torch.count_nonzero(kept)) == k * len(scores):  # the usual case: nothing ties with a k-th score
        return kept
    above = scores > threshold
    tied = kept ^ above
    room = k - above.sum(1, keepdim=True)
    if len(scores) == 1:  # it may be long: running sums would be as many numbers of 8 bytes
        kept[0, _true_places(tied)[int(room) :]] = False
        return kept
    return above | (tied & (tied.cumsum(1) <= room))


def _kth(scores: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, (rows, 1); numpy selects with vector instructions where the processor has them, and
    without the places that torch carries along."""
    if scores.device.type == "cpu":
        place = scores.shape[1] - k
        found = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True).numpy()  # holds each value
        found.partition(place, axis=1)
        return from_array(found[:, place : place + 1].copy()).to(scores.dtype)
    return scores.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


def ready(scores: Tensor, kept: Tensor | None = None) -> Tensor:
    """Scores that can be compared: detached, of a dtype with an order, and finite outside of `kept` (bool, same shape).

    Raises ValueError for NaN, infinities (naming how many) and dtypes that are not floating.
    """
    scores = scores.detach()
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating, got {scores.dtype}; convert them with .double()")
    if scores.itemsize == 1:  # torch cannot compare 8-bit floats; float32 holds each of them exactly
        scores = scores.float()
    read = scores if kept is None else scores.masked_fill(kept, 0.0)
    if read.numel() and not all(math.isfinite(end.item()) for end in torch.aminmax(read)):
        nan, infinite = int(read.isnan().sum()), int(read.isinf().sum())
        raise ValueError(
            f"scores must be finite: {nan} NaN and {infinite} infinite among {read.numel()} of shape "
            f"{tuple(read.shape)}; look for an overflow or a division by zero where they were made"
        )
    return scores


def count(sparsity: float, units: int) -> int:
    """Units that a sparsity leaves: floor((1 − s)·units + ½), with s taken as the decimal that was written.

    Raises ValueError unless 0 ≤ s ≤ 1 and units ≥ 0.

    >>> count(0.9, 235_200), count(0.5, 5), count(0.35, 10)
    (23520, 3, 7)
    """
    if not 0 <= sparsity <= 1 or units < 0:
        raise ValueError(f"count({sparsity}, {units}): the sparsity must be in [0, 1] and units at least 0")
    return math.floor((1 - Fraction(str(float(sparsity)))) * units + Fraction(1, 2))


def largest_remainder(ideal: Sequence[Fraction | float | int], total: int, caps: Sequence[int]) -> list[int]:
    """Whole shares that sum to `total`: each ideal rounded down, then the largest remainders rounded up.

    ideal: shares ≥ 0, about `total` in sum. caps: the most that each may get. Ties go to the lower index. What the
    ideals and caps leave over is shared out evenly in the same order, what they give too much is taken back evenly in
    the opposite order. Raises ValueError unless 0 ≤ total ≤ sum(caps).

    >>> largest_remainder([1.5, 1.5, 7.0], 10, [9, 9, 9])
    [2, 1, 7]
    >>> largest_remainder([2.5, 7.5], 10, [9, 6])
    [4, 6]
    """
    if len(ideal) != len(caps) or not 0 <= total <= sum(caps):
        raise ValueError(
            f"largest_remainder: {total} in {len(ideal)} shares, capped at {list(caps)}: there must be as many caps as "
            f"shares, and the total must be from 0 to their sum, {sum(caps)}"
        )
    exact = [Fraction(x) for x in ideal]
    shares = [min(math.floor(x), cap) for x, cap in zip(exact, caps, strict=True)]
    order = sorted(range(len(exact)), key=lambda i: math.floor(exact[i]) - exact[i])  # sorted is stable
    while (left := total - sum(shares)) > 0:
        _hand_out(left, [i for i in order if shares[i] < caps[i]], shares, caps)
    while (over := sum(shares) - total) > 0:
        holders = [i for i in reversed(order) if shares[i] > 0]
        taken = [0] * len(shares)
        _hand_out(over, holders, taken, shares)
        shares = [have - take for have, take in zip(shares, taken, strict=True)]
    return shares


def _hand_out(left: int, to: Iterable[int], shares: list[int], caps: Sequence[int]) -> None:
    """One round: an equal part, at least 1, to each in turn while any is left."""
    to = list(to)
    part = max(1, left // len(to))
    for i in to:
        given = min(part, left, caps[i] - shares[i])
        shares[i] += given
        left -= given


def _same_shape(mask: Tensor, scores: Tensor) -> Tensor:
    if mask.dtype is not torch.bool or mask.shape != scores.shape:
        raise ValueError(
            f"among must be a bool mask of the scores' shape {tuple(scores.shape)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    return mask
