"""Calibration data: batches cut to their real tokens, ready to be run, and a hash of what was used.

Padding is not masked but cut off: each sequence is reduced to the tokens that its attention mask names, and sequences
of equal length run together. So padding on the left, on the right or none at all gives the same statistics, and
position numbers are those of the sequence alone. Encoder–decoder models are cut by `decoder_attention_mask` likewise.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rarefy.core.gradients import take

_MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Batch:
    """One call of the model, model(*args, **kwargs). sequences: how many it holds (length of its first axis)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sequences: int


@dataclass(frozen=True)
class Calibration:
    """Batches without padding, and the sha256 of the windows used: the same for any grouping and padding of them."""

    batches: tuple[Batch, ...]
    digest: str

    @staticmethod
    def of(model: nn.Module, data: Iterable[Any] | Calibration) -> Calibration:
        """Read data: an iterable of batches (tensor: model(batch), tuple: model(*batch), mapping: model(**batch)).

        Raises ValueError for no batch, masks with holes and batches without any token.

        >>> ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
        >>> padded = {"input_ids": ids, "attention_mask": ids.ne(0)}
        >>> [batch.kwargs["input_ids"].tolist() for batch in Calibration.of(nn.Identity(), [padded]).batches]
        [[[5, 6]], [[7, 8, 9]]]
        """
        if isinstance(data, Calibration):
            return data
        batches: list[Batch] = []
        windows = hashlib.sha256()
        for index, batch in enumerate(take(data, None)):
            named = _named(model, batch)
            spans = _spans(named, index)
            for row in range(_rows(named) if spans is None else len(spans)):
                _hash_window(windows, named, None if spans is None else spans[row], row)
            batches += _cut(batch, named, spans)
        if not batches:
            raise ValueError("data= holds no real token: its attention masks name padding alone.")
        return Calibration(tuple(batches), windows.hexdigest())


_Span = dict[str, tuple[int, int]]  # mask name → first and past-the-last real token of one sequence


def _named(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The batch by parameter names of the model's forward, where they can be known; else by position."""
    if isinstance(batch, Mapping):
        return dict(cast(Mapping[str, Any], batch))
    values = tuple(cast(Sequence[Any], batch)) if isinstance(batch, tuple | list) else (batch,)
    try:
        names = [
            p.name for p in inspect.signature(model.forward).parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD
        ]
    except ValueError:
        names = []
    if len(names) < len(values):
        names = [f"{i}" for i in range(len(values))]
    return dict(zip(names, values, strict=False))


def _rows(named: Mapping[str, Any]) -> int:
    first = next((v for v in named.values() if isinstance(v, Tensor) and v.ndim), None)
    return 1 if first is None else int(first.shape[0])


def _spans(named: Mapping[str, Any], index: int) -> list[_Span] | None:
    """Where the real tokens of each sequence lie; None where no mask of a batch can or need be cut off."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name in _MASKS:
        mask = named.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2 and any(_follows(v, mask) for v in named.values()):
            found[name] = [_span(row, name, index, i) for i, row in enumerate(mask.ne(0))]
    if not found:
        return None
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _span(row: Tensor, name: str, batch: int, sequence: int) -> tuple[int, int]:
    real = row.nonzero().flatten()
    if not len(real):
        return (0, 0)
    start, stop = int(real[0]), int(real[-1]) + 1
    if stop - start != len(real):
        raise ValueError(
            f"{name} of sequence {sequence} in batch {batch} has holes: {stop - start - len(real)} masked tokens lie "
            "between real ones. Calibration cuts padding off at the left and right end: move it there."
        )
    return (start, stop)


def _follows(value: Any, mask: Tensor) -> bool:
    """Whether a tensor runs along the tokens of this mask: one entry a token, and not the mask itself."""
    return isinstance(value, Tensor) and value is not mask and value.ndim >= 2 and value.shape[:2] == mask.shape


def _cut(batch: Any, named: Mapping[str, Any], spans: list[_Span] | None) -> Iterator[Batch]:
    if spans is None:
        yield _as_given(batch, dict(named), _rows(named))
        return
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, span in enumerate(spans):
        lengths = tuple(stop - start for start, stop in span.values())
        if all(lengths):
            groups.setdefault(lengths, []).append(row)
    for rows in groups.values():
        cut = {name: _cut_value(value, name, named, [spans[r] for r in rows], rows) for name, value in named.items()}
        yield _as_given(batch, cut, len(rows))


def _as_given(batch: Any, named: dict[str, Any], rows: int) -> Batch:
    return Batch((), named, rows) if isinstance(batch, Mapping) else Batch(tuple(named.values()), {}, rows)


def _cut_value(value: Any, name: str, named: Mapping[str, Any], spans: list[_Span], rows: list[int]) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or len(value) != _rows(named):
        return value
    mask = _mask_of(value, name, named, spans[0])
    if mask is None:
        return value[rows]
    return torch.stack([value[row, slice(*span[mask])] for row, span in zip(rows, spans, strict=True)])


def _mask_of(value: Tensor, name: str, named: Mapping[str, Any], span: _Span) -> str | None:
    """The mask that says which tokens of a tensor are real; where both have its shape, its name decides."""
    fits = [mask for mask in span if value is named[mask] or _follows(value, named[mask])]
    if name in fits or len(fits) < 2:
        return name if name in fits else next(iter(fits), None)
    decodes = name.startswith("decoder_") or name == "labels"
    return "decoder_attention_mask" if decodes else "attention_mask"


def _hash_window(windows: Any, named: Mapping[str, Any], span: _Span | None, row: int) -> None:
    if span is not None and any(start == stop for start, stop in span.values()):
        return
    count = _rows(named)
    for name in sorted(named):
        value = named[name]
        if not isinstance(value, Tensor) or name in _MASKS:
            continue
        part = value[row] if value.ndim and len(value) == count else value
        mask = None if span is None or not value.ndim else _mask_of(value, name, named, span)
        if mask is not None and span is not None:
            part = part[slice(*span[mask])]
        windows.update(f"{name}:{part.dtype}:{tuple(part.shape)};".encode())
        windows.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
