"""How near an encoder is to the dense one: cosine of embeddings, and whether the same sentences are retrieved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rarefy.bench.sentences.encoder import embed
from rarefy.bench.statistics import interval

__all__ = ["Judge", "Quality", "make_judge", "out_of_domain", "recall"]

NEAREST = 10


class Quality(BaseModel):
    """recall: mean share of the dense model's ten nearest sentences that are among one's own ten, over queries; half:
    half of its 95 % interval. cosine: mean over all sentences of the cosine with the dense model's embedding."""

    model_config = ConfigDict(extra="forbid")

    recall: float
    half: float
    cosine: float


@dataclass(frozen=True)
class Judge:
    """Sentences as tokens, and the dense model's embeddings of them. queries: how many of the last are queries."""

    tokens: Sequence[Sequence[int]]
    dense: Tensor
    queries: int

    def __call__(self, encoder: Callable[..., Any]) -> Quality:
        """The quality of an encoder, called with input_ids and attention_mask."""
        found = embed(encoder, self.tokens)
        by_query = recall(found, self.dense, self.queries)
        cosines = torch.nn.functional.cosine_similarity(found, self.dense)
        half = interval(by_query.tolist()).half or 0.0
        return Quality(
            recall=round(float(by_query.mean()), 5), half=round(half, 5), cosine=round(float(cosines.mean()), 5)
        )

    def part(self, corpus: int, queries: int) -> Judge:
        """The same with the first so many sentences to retrieve, and the first so many queries."""
        first = len(self.tokens) - self.queries
        places = [*range(min(corpus, first)), *range(first, first + min(queries, self.queries))]
        return Judge([self.tokens[i] for i in places], self.dense[places], min(queries, self.queries))


def make_judge(encoder: Callable[..., Any], tokens: Sequence[Sequence[int]], queries: int) -> Judge:
    """A judge by the dense encoder. The last `queries` of the sentences are queries, the others are retrieved."""
    return Judge(tokens, embed(encoder, tokens), queries)


def recall(found: Tensor, dense: Tensor, queries: int, nearest: int = NEAREST) -> Tensor:
    """For each query the share of the `nearest` sentences by `dense` that are among those by `found`: [queries].

    Both [sentences + queries, width], rows of length one. A query is no sentence of the corpus.

    >>> dense = torch.eye(4)[[0, 1, 2, 0]]
    >>> recall(torch.eye(4)[[1, 0, 2, 0]], dense, queries=1, nearest=1)
    tensor([0.])
    """

    def top(embedded: Tensor) -> Tensor:
        return (embedded[-queries:] @ embedded[:-queries].T).topk(nearest).indices

    mine, theirs = top(found), top(dense)
    return (mine[:, :, None] == theirs[:, None, :]).any(1).float().mean(1)


def out_of_domain(folder: Path | None, corpus: int = 2000, queries: int = 300) -> tuple[str, ...]:
    """Sentences of WikiText-2 where `folder` has its test.txt, else none: text of quite another kind."""
    path = None if folder is None else folder / "wikitext2" / "test.txt"
    if path is None or not path.is_file():
        return ()
    found: dict[str, None] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip().startswith("="):
            for sentence in line.split(" . "):
                if 8 <= len(sentence.split()) <= 60 and "<unk>" not in sentence:
                    found[sentence.strip(" .") + " ."] = None
    return tuple(found)[: corpus + queries] if len(found) >= corpus + queries else tuple(found)
