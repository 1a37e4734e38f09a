"""Engines that run an encoder: torch, onnxruntime, OpenVINO, and this library's packed layers."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.bench.cpu import own
from rarefy.bench.cpu.document import LAYER
from rarefy.bench.cpu.peers import onnx_runtime, openvino
from rarefy.bench.cpu.peers.environments import Peers
from rarefy.bench.sentences.encoder import Encoder

__all__ = ["DENSE", "DTYPES", "TORCH", "Model", "Offer", "export", "offers"]

DENSE = "dense"
TORCH = "torch fp32"
DTYPES = ("fp32", "bf16", "int8")

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """An encoder and how sparse it is. dtypes: that it is packed in."""

    name: str
    encoder: Encoder
    sparsity: float
    dtypes: tuple[str, ...] = DTYPES


@dataclass(frozen=True)
class Offer:
    """A model on an engine. call: embeddings of any input. bind: a call without arguments on one input, to be timed."""

    model: Model
    engine: str
    call: Callable[..., Tensor]
    bind: Callable[[Inputs], Callable[[], object]]
    bytes: int | None = None
    choice: str | None = None


@dataclass(frozen=True)
class Place:
    """What engines need: threads, a folder for graphs, the peers, inputs of the shapes that are timed, sentences to
    calibrate with."""

    threads: int
    folder: Path
    peers: Peers
    shapes: Sequence[Inputs]
    calibration: Sequence[Inputs]


def offers(dense: Model, others: Sequence[Model], place: Place) -> Iterator[tuple[Model, str, Offer | str]]:
    """(model, engine, the offer or why there is none), one made after the other."""
    yield dense, TORCH, _of_torch(dense, TORCH, dense.encoder)
    rounded = copy.deepcopy(dense.encoder).bfloat16()
    yield dense, "torch bf16", _of_torch(dense, "torch bf16", rounded)
    for engine, make, needed in (
        ("onnxruntime fp32", _onnxruntime, ("onnx", "onnxruntime")),
        ("onnxruntime int8", _onnxruntime_int8, ("onnx", "onnxruntime")),
        ("OpenVINO int8", _openvino, ("onnx", "onnxruntime", "openvino")),
    ):
        absent = next((name for name in needed if not place.peers.has(name)), None)
        yield dense, engine, make(dense, engine, place) if absent is None else place.peers.missing[absent]
    for model in (dense, *others):
        for dtype in model.dtypes:
            yield model, f"{LAYER} {dtype}", _packed(model, dtype, place)


def _of_torch(model: Model, engine: str, encoder: Any) -> Offer:
    size = sum(p.numel() * p.element_size() for p in encoder.parameters())
    return Offer(model, engine, encoder, lambda inputs: lambda: encoder(**inputs), size)


def _packed(model: Model, dtype: str, place: Place) -> Offer | str:
    try:
        packed, report = own.packed(model.encoder, list(place.shapes), dtype, place.threads)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)
    counts = Counter(row.choice for row in report.rows)
    words = ", ".join(f"{count} {choice}" for choice, count in sorted(counts.items()))
    words += "; reverted" if report.reverted else ""
    made = _of_torch(model, f"{LAYER} {dtype}", packed)
    others = sum(p.numel() * p.element_size() for p in model.encoder.parameters()) - report.bytes_before
    size = others + report.bytes_after
    return Offer(model, made.engine, packed, made.bind, size, words)


def export(encoder: Encoder, inputs: Inputs, path: Path) -> str:
    """The encoder as an ONNX file for any number of sentences and tokens; needs the package onnx."""
    free = {0: "sentences", 1: "tokens"}
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of being the older of torch's two exporters, and of shapes it takes for fixed
        torch.onnx.export(
            encoder, tuple(t.clone() for t in inputs.values()), str(path), dynamo=False, opset_version=14,
            input_names=list(inputs), output_names=["y"],
            dynamic_axes={**dict.fromkeys(inputs, free), "y": {0: "sentences"}},
        )  # fmt: skip
    return str(path)


def _graph(model: Model, place: Place) -> str:
    path = place.folder / "dense.onnx"
    return str(path) if path.exists() else export(model.encoder, place.calibration[0], path)


def _onnxruntime(model: Model, engine: str, place: Place, path: str | None = None) -> Offer | str:
    try:
        path = path or _graph(model, place)
        session = onnx_runtime.session(path, place.threads)
    except (RuntimeError, ValueError, ModuleNotFoundError) as error:
        return f"{type(error).__name__}: {error}"[:300]

    def call(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0].copy())

    def bind(inputs: Inputs) -> Callable[[], object]:
        return onnx_runtime.runner(path, inputs, place.threads)

    return Offer(model, engine, call, bind, Path(path).stat().st_size)


def _onnxruntime_int8(model: Model, engine: str, place: Place) -> Offer | str:
    try:
        target = str(place.folder / "dynamic.onnx")
        path = onnx_runtime.quantised(_graph(model, place), target, {}, convolutions=False)
    except (RuntimeError, ValueError, ModuleNotFoundError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return _onnxruntime(model, engine, place, path)


def _openvino(model: Model, engine: str, place: Place) -> Offer | str:
    try:
        target = str(place.folder / "static.onnx")
        path = openvino.quantised(_graph(model, place), target, place.calibration)
        compiled = openvino.compiled(path, place.threads)
    except (RuntimeError, ValueError, ModuleNotFoundError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return Offer(
        model, engine, lambda **inputs: openvino.result(compiled, inputs),
        lambda inputs: openvino.runner(compiled, inputs), Path(path).stat().st_size,
    )  # fmt: skip
