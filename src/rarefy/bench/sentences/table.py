"""The tables of the sentence encoder and what they say, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rarefy.bench.cpu.grids import Grid, digits
from rarefy.bench.sentences.documents import Document, Engine
from rarefy.bench.sentences.engines import DENSE
from rarefy.bench.sentences.judge import Quality

__all__ = ["grids", "sentences", "shapes_of"]


def grids(document: Document) -> list[Grid]:
    """What has been measured: engines, distilled, in one shot."""
    return [_engines(document), _distilled(document), _one_shot(document)]


def shapes_of(document: Document) -> list[str]:
    """ "batch×tokens" that were timed, small ones first."""
    found = {shape for each in document.engines for shape in each.times}
    return sorted(found, key=lambda shape: [int(n) for n in reversed(shape.split("×"))])


def _engines(document: Document) -> Grid:
    shapes = shapes_of(document)
    rows = tuple(
        (
            each.model, each.engine, *_shown(each.quality), *(_time(each, shape) for shape in shapes),
            "–" if each.bytes is None else digits(each.bytes / 1e6),
        )
        for each in document.engines
        if each.times or each.quality
    )  # fmt: skip
    note = (
        "Recall@10 and cosine are of the same model, engine and values, packed once more, against the dense model in "
        "float32; ± 95 % interval over "
        "queries. Times: median ms of a call (batch×tokens, no padding), and × over torch fp32 in the same rounds. "
        "MB: stored weights, word embeddings (47 MB in fp32) included; a packed model keeps those in fp32. OpenVINO: "
        "weights and activations of the Linears in int8 (static ranges, by onnxruntime's quantiser), the rest "
        "fp32; onnxruntime int8: dynamic. " + _compared(document, "engines")
    )
    columns = ("model", "engine", "recall@10", "cosine", *shapes, "MB")
    return Grid("Latency, and what each setting retrieves", columns, rows, left=2, note=note)


def _compared(document: Document, part: str) -> str:
    corpus, queries = document.compared.get(part, (0, 0))
    return (
        f"Retrieved, for {queries} queries, from the first {corpus:,} of the held-out docstrings, "
        "fewer than for the distilled table."
    )


def _time(each: Engine, shape: str) -> str:
    if shape not in each.times:
        return "–"
    ratio = each.speedup.get(shape)
    faster = "" if ratio is None else f" ({ratio.median:.2f}×)"
    return digits(each.times[shape].median / 1000) + faster


def _shown(quality: Quality | None) -> tuple[str, str]:
    if quality is None:
        return "–", "–"
    return f"{quality.recall:.3f} ± {quality.half:.3f}", f"{quality.cosine:.4f}"


def _distilled(document: Document) -> Grid:
    texts = list(document.texts)
    rows = [(DENSE, "0 %", *_by_text(document.dense, texts), "–", "–", "–")]
    for each in document.distilled:
        said = each.training
        zeros = f"{100 * (1 - each.kept / each.total):.2f} %"
        begun = f"{100 * said['recipe']['initial']:g} %"
        cost = (begun, f"{said['seconds'] / 60:.0f}", f"{said['steps']:,}")
        rows.append((each.name, zeros, *_by_text(each.quality, texts), *cost))
    columns = ("model", "zeros", *(f"{what}, {text}" for text in texts for what in ("recall@10", "cosine")))
    note = (
        "Zeros: of the encoder's Linears; embeddings, norms and biases are dense. From: the zeros of the model that "
        "the training began with."
    )
    return Grid("Distilled", (*columns, "from", "minutes", "steps"), tuple(rows), note=note)


def _by_text(quality: dict[str, Quality], texts: list[str]) -> list[str]:
    return [cell for text in texts for cell in _shown(quality.get(text))]


def _one_shot(document: Document) -> Grid:
    patterns = list(dict.fromkeys(each.pattern for each in document.one_shot))
    rows = []
    for method in dict.fromkeys(each.method for each in document.one_shot):
        its = {each.pattern: each for each in document.one_shot if each.method == method}
        cells = (f"{its[p].quality.recall:.3f} / {its[p].quality.cosine:.4f}" if p in its else "–" for p in patterns)
        rows.append((method, *cells, digits(max(each.seconds for each in its.values()))))
    note = (
        "Recall@10 / mean cosine of embeddings with the dense model's; s: the longest pruning. Random is the control. "
        + _compared(document, "one-shot")
    )
    return Grid("In one shot, without training", ("method", *patterns, "s"), tuple(rows), note=note)


def sentences(document: Document) -> list[str]:
    """What was lost, and which settings beat the others' best at each shape."""
    text = next(iter(document.texts), "")
    said = [
        f"{each.name}: of the ten sentences that the dense model retrieves "
        f"{100 * (1 - each.quality[text].recall):.1f} % are others; the mean cosine of an embedding with "
        f"the dense one is {each.quality[text].cosine:.4f}."
        for each in document.distilled
    ]
    return [*said, *(tell(document, shape) for shape in shapes_of(document) for tell in (_fastest, _front))]


def _fastest(document: Document, shape: str) -> str:
    timed = [each for each in document.engines if shape in each.times]
    ours = [each for each in timed if each.model != DENSE]
    peers = [each for each in timed if each.model == DENSE]
    if not ours or not peers:
        return f"{shape}: nothing to compare."
    best, peer = (min(group, key=lambda each: each.times[shape].median) for group in (ours, peers))
    a, b = (each.times[shape].median / 1000 for each in (best, peer))
    lead = f"{b / a:.2f}× faster" if a < b else f"{a / b:.2f}× slower"
    return (
        f"{shape}: the fastest sparse setting, {_named(best)}, takes {digits(a)} ms, {lead} than the fastest "
        f"dense one, {_named(peer)}, with {digits(b)} ms. By the least of all rounds instead of their median: "
        f"{' and '.join(_least(group, shape) for group in (ours, peers))}."
    )


def _least(group: Sequence[Engine], shape: str) -> str:
    best = min(group, key=lambda each: each.times[shape].minimum)
    return f"{best.model} on {best.engine}, {digits(best.times[shape].minimum / 1000)} ms"


def _front(document: Document, shape: str) -> str:
    """The settings that no other one beats both in time and in recall, the fastest first."""
    timed = [(each.times[shape].median, each.quality.recall, each) for each in document.engines
             if shape in each.times and each.quality is not None]  # fmt: skip
    front: list[str] = []
    best = -1.0
    for taken, recall, each in sorted(timed, key=lambda one: (one[0], -one[1])):
        if recall > best:
            best = recall
            front.append(f"{each.model} on {each.engine} ({digits(taken / 1000)} ms, {recall:.3f})")
    return f"{shape}: none is both faster and nearer than {', '.join(front) or 'anything'}."


def _named(each: Engine) -> str:
    recall = "" if each.quality is None else f" (recall {each.quality.recall:.3f})"
    return f"{each.model} on {each.engine}{recall}"
