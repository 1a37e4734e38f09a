"""Calibration data: windows of real text, drawn by a seed, named by a hash.

A source of text is tokenised once, without special tokens; documents of JSON lines and parquet are joined by blank
lines. Each window is a run of tokens at a position drawn uniformly (with replacement, so that windows of a short text
may overlap) by `torch.Generator().manual_seed(seed)`. Of a long source only the first part is read: 64 characters for
each token that the windows hold, and no fewer than 16 million.

What the tokenizer puts around a text (<s> of Llama, [CLS] and [SEP] of BERT, </s> of T5) stands in every window by
default, within its length: `bos="window"`. A model that always sees <s> first puts its largest activations there, and
windows without it would show it inputs that it never meets. `bos="none"` leaves it out, as the published Wanda and
SparseGPT code does for all but the first tokens of a document.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rarefy.io.texts import read_text

__all__ = ["SAMPLES", "Calibration", "default_length", "encode", "frame", "windows"]

SAMPLES = 128
_LONGEST = 2048
_TOKENS_PER_BATCH = 4096
_CHARACTERS, _AT_LEAST = 64, 16_000_000

Bos = Literal["window", "none"]


@dataclass(frozen=True)
class Calibration:
    """Batches for `rarefy.sparsify(..., data=calibration)`: each a dict with `input_ids` (and a mask, if given).

    sha256: of all windows in their order, whatever the batches: for each its length and its token ids, as int64 in
    little-endian order. settings: how they were made, as JSON values.
    """

    batches: list[dict[str, Tensor]]
    sha256: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        """How many batches."""
        return len(self.batches)

    @property
    def windows(self) -> int:
        """How many windows."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Of all windows, padding included."""
        return sum(batch["input_ids"].numel() for batch in self.batches)


def windows(
    source: str | os.PathLike[str] | Iterable[Any],
    tokenizer: Any = None,
    length: int = _LONGEST,
    count: int = SAMPLES,
    seed: int = 0,
    *,
    field: str | None = None,
    bos: Bos = "window",
) -> Calibration:
    """Windows to calibrate with, from a file of text or from batches of tokens.

    Args:
        source: a path (text, `.jsonl`, `.parquet`), or an iterable of token batches: tensors [sequences, tokens] or
            [tokens], lists of ids, or mappings with `input_ids` and perhaps `attention_mask`. Batches are taken as
            they are, the first `count` sequences of them: nothing is drawn, cut or framed.
        tokenizer: of the model; not needed for token batches.
        length: tokens in a window, with what the tokenizer puts around a text.
        count: windows.
        seed: of the positions.
        field: of JSON lines and parquet, default "text".
        bos: "window": every window is framed as the tokenizer frames a text; "none": text alone.

    Raises ValueError for a source shorter than one window, with both lengths, and for one without tokens.

    >>> found = windows([torch.arange(6).view(2, 3), [1, 2, 3, 4]], count=3)
    >>> found.windows, [batch["input_ids"].shape for batch in found]
    (3, [torch.Size([2, 3]), torch.Size([1, 4])])
    """
    if length < 2 or count < 1:
        raise ValueError(
            f"length={length}, samples={count}: windows hold two tokens at least, and there is one at least"
        )
    if not isinstance(source, str | os.PathLike):
        return _given(source, count)
    if tokenizer is None:
        raise ValueError(f"{source} is text, and windows are made of tokens: give the model's tokenizer")
    path = Path(source)
    before, after = frame(tokenizer) if bos == "window" else ([], [])
    inside = length - len(before) - len(after)
    text = read_text(path, field=field, limit=max(_AT_LEAST, _CHARACTERS * length * count))
    ids = encode(tokenizer, text)
    if inside < 1 or len(ids) < inside:
        raise ValueError(
            f"{path} holds {len(ids)} tokens, fewer than one window of {inside}"
            f"{f' (length {length} with {length - inside} special tokens)' if inside < length else ''}: "
            f"give more text, or --length {len(ids) + length - inside} or less"
        )
    drawn = _draw(ids, inside, count, seed)
    framed = torch.cat([_repeated(before, count), drawn, _repeated(after, count)], 1)
    settings = {
        "source": path.name, "field": field, "tokens_in_source": len(ids), "windows": count, "length": length,
        "seed": seed, "bos": bos,
    }  # fmt: skip
    batches = [{"input_ids": rows} for rows in framed.split(max(1, _TOKENS_PER_BATCH // length))]
    return Calibration(batches, _digest(batches), settings)


def default_length(context: int | None) -> int:
    """Tokens in a window where none are asked for: the model's context, 2048 at most."""
    return _LONGEST if context is None else min(context, _LONGEST)


def encode(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text [tokens], int64, without special tokens around it."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text by itself."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _draw(ids: Tensor, length: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]


def _repeated(ids: list[int], count: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64).expand(count, -1)


def _given(source: Iterable[Any], count: int) -> Calibration:
    """Batches that somebody else made."""
    batches: list[dict[str, Tensor]] = []
    left = count
    for index, given in enumerate(source):
        batch = {name: tensor[:left] for name, tensor in _named(given, index).items()}
        batches.append(batch)
        left -= len(batch["input_ids"])
        if left <= 0:
            break
    if not batches:
        raise ValueError("the calibration data hold no batch: give at least one batch of token ids")
    return Calibration(batches, _digest(batches), {"source": "batches", "windows": count - max(0, left)})


def _named(given: Any, index: int) -> dict[str, Tensor]:
    named = dict(given) if isinstance(given, Mapping) else {"input_ids": given}
    if "input_ids" not in named:
        raise ValueError(f"batch {index} of the calibration data has no input_ids, but {', '.join(map(str, named))}")
    try:
        found = {name: torch.as_tensor(value) for name, value in named.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"batch {index} of the calibration data is no batch of token ids: {error}") from None
    found = {name: tensor[None] if tensor.ndim == 1 else tensor for name, tensor in found.items()}
    ids = found["input_ids"]
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(
            f"batch {index} of the calibration data has shape {tuple(ids.shape)} and dtype {ids.dtype}: token ids are "
            "whole numbers of shape [sequences, tokens]"
        )
    return {**found, "input_ids": ids.long()}


def _digest(batches: list[dict[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        masks = batch.get("attention_mask")
        for index, row in enumerate(batch["input_ids"]):
            kept = row if masks is None else row[masks[index].bool()]
            found.update(len(kept).to_bytes(8, "little"))
            found.update(kept.cpu().numpy().astype("<i8").tobytes())
    return found.hexdigest()
