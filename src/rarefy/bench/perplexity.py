"""Perplexity of a causal language model on a text, in windows that do not overlap, as pruning papers measure it.

The text is tokenised once and cut into windows of `length` tokens; a last part that fills none is left out. In each
window the model predicts every token but the first from those before it. The official code of SparseGPT and Wanda
multiplies each window's mean over these length − 1 targets by `length` and divides the sum by windows · length: the
factor cancels, so

    perplexity = exp( mean over windows of mean over length − 1 targets of −ln p )

which is the plain mean over all targets, since windows are equally long. Where ours differs from the official code: it
is summed in float64 (theirs: in the model's dtype), and a text with fewer tokens than a window is an error. Where
windows begin is said by `bos`:

| bos | windows | for |
|---|---|---|
| text | the tokenizer's own first tokens stand once, before the text | published tables |
| window | they stand before each window, within its length; all tokens of text are targets | models that need them |
| none | text alone | |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.bench.statistics import interval
from rarefy.io.calibration import frame
from rarefy.io.texts import read_text

__all__ = ["Bos", "Perplexity", "Text", "perplexity", "read_windows"]

Bos = Literal["text", "window", "none"]
Progress = Callable[[int, int, str], object]

_LOGITS = 1 << 28  # bytes of float32 logits that a batch of windows makes, about


@dataclass(frozen=True)
class Perplexity:
    """What was found. value: the perplexity; low, high: its 95 % interval over windows (None for one window).

    top1: share of targets that the model ranks first. bits_per_byte: of the text that the windows hold; None where that
    is not known. targets: tokens predicted; seconds: of the forward passes.
    """

    value: float
    low: float | None
    high: float | None
    top1: float
    bits_per_byte: float | None
    windows: int
    length: int
    targets: int
    seconds: float
    nll_per_window: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through the model per second."""
        return self.windows * self.length / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "nll_per_window": list(self.nll_per_window),
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class Text:
    """Windows [windows, length] of token ids, and the bytes of text per token of text in them."""

    windows: Tensor
    bytes_per_token: float | None
    tokens_in_text: int
    bos: Bos


def read_windows(
    path: Path, tokenizer: Any, length: int, *, count: int | None = None, bos: Bos = "text", field: str | None = None
) -> Text:
    """The windows of a file of text (plain, `.jsonl`, `.parquet`), from its beginning; `count` of them at most.

    Raises ValueError for a text of fewer tokens than one window.
    """
    if length < 2 or (count is not None and count < 1):
        raise ValueError(
            f"length={length}, windows={count}: a window holds two tokens at least, and there is one at least"
        )
    text = read_text(path, field=field)
    before = [] if bos == "none" else frame(tokenizer)[0]
    each = len(before) if bos == "window" else 0
    once = len(before) if bos == "text" else 0
    coded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids = torch.tensor(before[:once] + list(coded["input_ids"]), dtype=torch.int64)
    inside = length - each
    found = len(ids) // inside if inside > 0 else 0
    if not found:
        raise ValueError(
            f"{path} holds {len(ids)} tokens, fewer than one window of {length}: give more text, or a --length of "
            f"{len(ids) + each} or less"
        )
    found = min(found, count or found)
    rows = ids[: found * inside].view(found, inside)
    if each:
        rows = torch.cat([torch.tensor(before).expand(found, -1), rows], 1)
    tokens = found * inside - once
    return Text(rows, _bytes(text, coded, tokens) / tokens, len(ids) - once, bos)


def _bytes(text: str, coded: Any, tokens: int) -> float:
    """Bytes of text that its first tokens stand for; where a tokenizer does not say, their share of the whole text."""
    offsets = coded.get("offset_mapping")
    if offsets is None:
        return len(text.encode()) * tokens / len(coded["input_ids"])
    return len(text[: offsets[tokens - 1][1]].encode())


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    length: int | None = None,
    *,
    batch: int | None = None,
    bytes_per_token: float | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity and top-1 accuracy of a causal language model: model(input_ids) has `logits`, or is them.

    Args:
        tokens: windows [windows, length] of token ids, or the tokens of a text [tokens], cut here into windows of
            `length` tokens.
        batch: windows per forward pass; by default as many as make a quarter of a GiB of logits.
        bytes_per_token: of text, for bits per byte: mean bits per target / bytes per token.
        progress: called with (windows done, windows, "").

    The model is evaluated in its present dtype, in evaluation mode; its own mode is restored. Raises ValueError for
    fewer tokens than a window, for logits of another shape, and where they are not finite.

    >>> model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    >>> _ = nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    >>> found = perplexity(model, torch.arange(24) % 8, length=6)
    >>> found.windows, found.targets, round(found.value, 3)
    (4, 20, 8.0)
    """
    rows = _cut(tokens, length)
    begin, nll, right, done = time.perf_counter(), torch.zeros(len(rows), dtype=torch.float64), 0, 0
    with _evaluating(model):
        for part in _parts(model, rows, batch):
            logits = _logits(model, part)
            for index, (scores, targets) in enumerate(zip(logits[:, :-1], part[:, 1:], strict=True)):
                losses = functional.cross_entropy(scores.float(), targets.to(scores.device), reduction="none")
                nll[done + index] = losses.double().mean().cpu()
                right += int((scores.argmax(-1) == targets.to(scores.device)).sum())
            done += len(part)
            if progress is not None:
                progress(done, len(rows), "")
    seconds = time.perf_counter() - begin
    return _summed(nll, right, rows, bytes_per_token, seconds)


def _cut(tokens: Tensor, length: int | None) -> Tensor:
    if tokens.ndim == 2 and length in (None, tokens.shape[1]):
        rows = tokens
    elif tokens.ndim == 1 and length is not None and length > 1:
        rows = tokens[: len(tokens) // length * length].view(-1, length)
    else:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and length={length}: give windows, or tokens [n] and a length above 1"
        )
    if not len(rows) or rows.shape[1] < 2:
        raise ValueError(
            f"{tokens.numel()} tokens are fewer than one window of {length}: give more text or a shorter length"
        )
    return rows


def _parts(model: nn.Module, rows: Tensor, batch: int | None) -> Iterator[Tensor]:
    if batch is None:
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1 << 15
        batch = max(1, _LOGITS // (4 * rows.shape[1] * vocabulary))
    yield from rows.split(batch)


def _logits(model: Any, part: Tensor) -> Tensor:
    if hasattr(model, "config"):  # a model of transformers; a cache would only be filled and thrown away
        part = part.to(model.device)
        found = model(input_ids=part, use_cache=False)
    else:
        found = model(part)
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != part.shape:
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(found).__name__
        raise ValueError(f"the model returned {seen} for windows {tuple(part.shape)}: logits for each token are needed")
    return logits


class _evaluating:
    """Evaluation mode for the block."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = {module: module.training for module in model.modules()}
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode


def _summed(nll: Tensor, right: int, rows: Tensor, bytes_per_token: float | None, seconds: float) -> Perplexity:
    values = nll.tolist()
    if not all(map(math.isfinite, values)):
        bad = sum(not math.isfinite(x) for x in values)
        raise ValueError(
            f"{bad} of {len(values)} windows have a loss that is not finite: the model's weights are damaged"
        )
    found = interval(values)
    low, high = (None, None) if found.half is None else (_exp(found.mean - found.half), _exp(found.mean + found.half))
    targets = len(rows) * (rows.shape[1] - 1)
    bits = None if bytes_per_token is None else found.mean / math.log(2) / bytes_per_token
    return Perplexity(
        _exp(found.mean), low, high, right / targets, bits, len(rows), rows.shape[1], targets, seconds, tuple(values)
    )


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
