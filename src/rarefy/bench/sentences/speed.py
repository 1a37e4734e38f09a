"""Times of all engines in the same rounds, shape by shape, and the quality of each; both go into the document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.bench.cpu.document import Comparison, Timing
from rarefy.bench.cpu.timing import Local, Plan, measure, paired_ratio
from rarefy.bench.seeds import generator
from rarefy.bench.sentences.documents import Document
from rarefy.bench.sentences.engines import DENSE, TORCH, Model, Offer, Place, offers
from rarefy.bench.sentences.judge import Judge

__all__ = ["Shape", "example", "run"]

Shape = tuple[int, int]


def example(shape: Shape, vocabulary: int) -> dict[str, Tensor]:
    """Random words, no padding: [batch, tokens]."""
    ids = torch.randint(min(1000, vocabulary // 2), vocabulary, shape, generator=generator("sentences input", 0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(
    document: Document,
    dense: Model,
    others: Sequence[Model],
    place: Place,
    *,
    plan: Plan | None,
    judge: Judge | None,
    say: Callable[[str], Any] = lambda text: None,
) -> None:
    """Make all offers; with a plan time them at `place.shapes`, with a judge say what they retrieve."""
    made: list[Offer] = []
    with torch.inference_mode():
        for model, engine, offer in offers(dense, others, place):
            say(f"{model.name} {engine}")
            entry = document.engine(model.name, engine, model.sparsity)
            if isinstance(offer, str):
                entry.left_out = offer
                continue
            entry.left_out, entry.bytes = None, offer.bytes
            made.append(offer)
            if judge is not None:
                entry.quality = judge(offer.call)
        if plan is not None:
            for inputs in place.shapes:
                say(name_of(inputs))
                _time(document, made, inputs, plan)


def name_of(inputs: dict[str, Tensor]) -> str:
    """ "batch×tokens"."""
    return "×".join(map(str, inputs["input_ids"].shape))


def _time(document: Document, made: Sequence[Offer], inputs: dict[str, Tensor], plan: Plan) -> None:
    shape = name_of(inputs)
    candidates = {(each.model.name, each.engine): Local((each.bind(inputs),)) for each in made}
    samples, slow = measure({" on ".join(key): local for key, local in candidates.items()}, plan)
    base = samples.get(f"{DENSE} on {TORCH}")
    for offer in made:
        key = f"{offer.model.name} on {offer.engine}"
        entry = document.engine(offer.model.name, offer.engine, offer.model.sparsity)
        if key in slow:
            entry.left_out = slow[key]
            continue
        entry.times[shape] = Timing.of(samples[key])
        if base is not None:
            entry.speedup[shape] = Comparison.of(paired_ratio(base, samples[key]))
        if offer.choice is not None:
            entry.choice[shape] = offer.choice
