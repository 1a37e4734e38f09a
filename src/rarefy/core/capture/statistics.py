"""What calibration tells about the inputs of one matrix: first and second moments, and the Gram matrix if asked for.

Rows are taken in chunks, so that temporary memory stays small whatever the batch. Moments are summed in float64, the
Gram matrix in the dtype asked for: as the inputs come, or, where too many matrices would be held at once (a mixture's
experts), from inputs that are kept, in files beyond a limit, when it is asked for. Both give the same bits.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.core.capture.store import Store

_CHUNK = 1 << 18  # entries converted to float64 at a time: the fastest of 2^15 to 2^19 for 1024 to 4096 features
_GRAM_CHUNK = 1 << 23  # entries of a chunk that must be converted before it enters the Gram matrix
_GRAM_COLUMNS = 256  # columns of the Gram matrix made at a time, down to the diagonal alone


@dataclass
class Statistics:
    """Of the inputs x of one matrix W (out, in), y = x Wᵀ, over all calibration tokens; on the device of the inputs.

    tokens: rows x seen. squares [in] float64: Σ x². sums [in] float64: Σ x.
    sequences: how many they came in: b for a batch of b, or 1 for each call whose rows do not divide so (an expert's).
    within [in] float64: Σ over sequences of (its tokens) · (unbiased variance within it); a sequence of one token has
    none. Rows are taken to lie sequence by sequence; a layer that runs with the tokens first (nn.MultiheadAttention
    inside) mixes sequences in `within`, and in that alone.
    outer: what `gram` is or is made of.

    >>> from rarefy.core.capture.statistics import Accumulator
    >>> found = Accumulator(2, gram=torch.float64)
    >>> found.add(torch.tensor([[[1.0, 2.0], [3.0, 2.0]]]))
    >>> found.result()[0].squares, found.result()[0].within
    (tensor([10.,  8.], dtype=torch.float64), tensor([4., 0.], dtype=torch.float64))
    """

    tokens: int
    sequences: int
    squares: Tensor
    sums: Tensor
    within: Tensor
    outer: Tensor | Inputs | None = None

    @property
    def gram(self) -> Tensor | None:
        """[in, in]: Σ x xᵀ, symmetric, or None where it was not asked for; made anew where inputs are kept."""
        return self.outer.gram() if isinstance(self.outer, Inputs) else self.outer

    def hessian(self) -> Tensor:
        """2 / tokens · Σ x xᵀ, a fresh tensor: of the mean squared error of an output. RuntimeError without a gram."""
        if (gram := self.gram) is None:
            raise RuntimeError("no Gram matrix was collected: ask for one, gram=torch.float32 or torch.float64.")
        return gram * (2 / max(1, self.tokens))

    def variance(self) -> Tensor:
        """[in] float64: the variance within sequences, token-weighted."""
        return self.within / max(1, self.tokens)


class Inputs:
    """The inputs of one matrix, kept in a store for as long as this lives; its Gram matrix is made of them."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | None, store: Store) -> None:
        self._width, self._dtype, self._device, self._store = width, dtype, device, store
        self._handles: list[int] = []
        weakref.finalize(self, store.drop_all, self._handles).atexit = False

    def add(self, x: Tensor) -> None:
        """x: (sequences, tokens of each, in)."""
        self._handles.append(self._store.put(x))

    def gram(self) -> Tensor:
        """[in, in]: Σ x xᵀ, a fresh tensor. Raises RuntimeError where the walk that kept the inputs is over."""
        if not self._store.holds(self._handles):
            raise RuntimeError("the inputs of this block were let go: ask for its Gram matrices before the next block.")
        gram = torch.zeros(self._width, self._width, dtype=self._dtype, device=self._device)
        for handle in self._handles:
            _add_gram(gram, self._store.get(handle))
        _symmetric_(gram)
        return gram


class Accumulator:
    """Adds up the inputs of `matrices` matrices of one width that see the same number of tokens (convolution groups).

    width: inputs of each. gram: dtype of the Gram matrix, None for none. store: of one matrix, keeps inputs until its
    Gram matrix is asked for.
    """

    def __init__(
        self,
        width: int,
        *,
        matrices: int = 1,
        gram: torch.dtype | None = None,
        device: torch.device | None = None,
        store: Store | None = None,
    ) -> None:
        if gram not in (None, torch.float32, torch.float64):
            raise ValueError(f"gram={gram}: Gram matrices are float32 or float64.")
        self.width, self.matrices, self.dtype = width, matrices, gram
        self.tokens = self.sequences = 0
        moments = torch.zeros(3, matrices, width, dtype=torch.float64, device=device)
        self.squares, self.sums, self.within = moments.unbind()
        self.gram: Tensor | Inputs | None = None
        if gram is not None and store is not None and matrices == 1:
            self.gram = Inputs(width, gram, device, store)
        elif gram is not None:
            self.gram = torch.zeros(matrices, width, width, dtype=gram, device=device)

    def add(self, x: Tensor) -> None:
        """x: (sequences, tokens of each, in), or (sequences, tokens of each, matrices, in) for several matrices."""
        if not x.numel():
            return
        x = x.detach().view(*x.shape[:2], self.matrices, self.width) if x.ndim == 3 else x.detach()
        count, length = x.shape[:2]
        self.tokens += count * length
        self.sequences += count
        step = max(1, _CHUNK // (length * self.matrices * self.width))
        for start in range(0, count, step):
            self._add_moments(x[start : start + step])
        if isinstance(self.gram, Inputs):
            self.gram.add(x[:, :, 0])
        elif self.gram is not None and self.matrices == 1:
            _add_gram(self.gram[0], x[:, :, 0])
        elif self.gram is not None:
            _add_grams(self.gram, x)

    def _add_moments(self, x: Tensor) -> None:
        length = x.shape[1]
        rows = max(1, _CHUNK // (len(x) * self.matrices * self.width))
        sums = squares = torch.zeros((), dtype=torch.float64, device=x.device)
        for start in range(0, length, rows):
            chunk = x[:, start : start + rows].to(torch.float64, copy=True)
            sums = sums + chunk.sum(1)
            squares = squares + chunk.square_().sum(1)
        self.sums += sums.sum(0)
        self.squares += squares.sum(0)
        if length > 1:
            around_mean = (squares - sums.square() / length).clamp_(min=0)
            self.within += around_mean.sum(0) * (length / (length - 1))

    def refuse_infinite(self, name: str) -> None:
        """ValueError naming the site where an input was NaN or infinite, or too large for the Gram matrix's dtype."""
        if not bool(torch.isfinite(self.squares).all()):
            raise ValueError(
                f"inputs of {name!r} hold NaN or infinite values: nothing of this block was changed. Look for damaged "
                "weights, padding that no attention mask names, or an overflow (float16 activations: use bfloat16)."
            )
        if self.dtype is not None and float(self.squares.amax()) > torch.finfo(self.dtype).max:
            raise ValueError(f"inputs of {name!r} overflow {self.dtype}: ask for gram=torch.float64.")

    def result(self) -> list[Statistics]:
        """One Statistics for each matrix: views of what has been added up, made symmetric."""
        gram = self.gram
        if isinstance(gram, Tensor) and self.matrices == 1:
            _symmetric_(gram[0])
        elif isinstance(gram, Tensor):
            gram.copy_(gram.triu() + gram.triu(1).mT)
        return [
            Statistics(
                self.tokens,
                self.sequences,
                self.squares[i],
                self.sums[i],
                self.within[i],
                gram[i] if isinstance(gram, Tensor) else gram,
            )
            for i in range(self.matrices)
        ]


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """gram += xᵀ x above the diagonal. x: (sequences, tokens, in), any floating dtype and strides."""
    rows = x.flatten(0, 1)  # a view wherever the sequences lie one after the other
    step = len(rows) if rows.dtype == gram.dtype else max(1, _GRAM_CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step].to(gram.dtype)
        for left in range(0, gram.shape[0], _GRAM_COLUMNS):
            right = left + _GRAM_COLUMNS
            gram[:right, left:right].addmm_(chunk[:, :right].T, chunk[:, left:right])


def _add_grams(grams: Tensor, x: Tensor) -> None:
    """The same for the many small matrices of a grouped convolution. x: (sequences, tokens, matrices, in)."""
    rows = x.flatten(0, 1)
    step = max(1, _GRAM_CHUNK // (rows.shape[1] * rows.shape[2]))
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step].to(grams.dtype).transpose(0, 1)
        grams.baddbmm_(chunk.mT, chunk)


def _symmetric_(gram: Tensor) -> None:
    """The upper triangle's entries below the diagonal too, in place and without a second matrix."""
    for left in range(0, gram.shape[0], _GRAM_COLUMNS):
        right = left + _GRAM_COLUMNS
        gram[right:, left:right] = gram[left:right, right:].T
        corner = gram[left:right, left:right]
        corner.copy_(corner.triu() + corner.triu(1).T)
