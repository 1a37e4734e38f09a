"""Whole networks: torch dense, the best dense, packed, and other libraries; weights as they are in use.

In every row stands "without weights": the network with stand-ins for its sparse layers, the part of the time that no
kernel for weights can remove.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.cpu import own
from rarefy.bench.cpu.cases import Zeros
from rarefy.bench.cpu.context import Context
from rarefy.bench.cpu.dense import dynamic_int8_model
from rarefy.bench.cpu.document import LAYER, Row, make_row
from rarefy.bench.cpu.matrices import LLAMA, sort_out
from rarefy.bench.cpu.model_cases import ModelCase, build, prune, stand_ins
from rarefy.bench.cpu.peers import llama, onnx_runtime
from rarefy.bench.cpu.timing import measure
from rarefy.bench.seeds import generator

__all__ = ["WITHOUT", "measure_model"]

WITHOUT = "without weights"
_KINDS = {"bf16": ("BF16",), "int8": ("Q8_0", "Q4_0")}


def measure_model(case: ModelCase, context: Context) -> Iterator[Row]:
    """One row for each of the case's zeros."""
    network = case.network
    x = network.example(case.batch, generator(f"cpu input {network.name}", 0))
    with torch.inference_mode(), ExitStack() as stack:
        context.say(f"{case} dense")
        model = build(network, generator(f"cpu {network.name}", 0))
        dense = _dense(case, context, model, x, stack)
        for zeros in case.zeros:
            context.say(f"{case} {zeros}")
            yield _row(case, context, zeros, model, x, dense)
            context.forget()


def _row(case: ModelCase, context: Context, zeros: Zeros, model: nn.Module, x: Tensor, dense: dict[str, Any]) -> Row:
    sparse = copy.deepcopy(model)
    kept, weights = prune(sparse, case.network, zeros, generator(f"cpu {case.network.name} {zeros}", 0))
    offers = dict(dense)
    facts: dict[str, float | str] = {"sparse weights": weights}
    if case.dtype == "fp32" and "onnx" in case.network.peers:
        offers["DeepSparse"] = _deepsparse(case, context, sparse, x)
    expected = sparse(x).float()
    packed, choice, nbytes = _packed(case, context, sparse, x)
    offers[LAYER] = packed if isinstance(packed, str) else [lambda: packed(x)]
    if not isinstance(packed, str):
        facts["error"] = relative_error(packed(x).float(), expected)
    candidates, left_out = sort_out(offers)
    samples, slow = measure(candidates, context.plan)
    row = Row(
        section="model", name=case.network.name, batch=case.batch, regime="cold", dtype=case.dtype,
        pattern=zeros.pattern, sparsity=zeros.sparsity, nonzeros=kept, bytes=nbytes, choice=choice,
        left_out={**left_out, **slow}, facts=facts,
    )  # fmt: skip
    return make_row(row, samples, {})


def relative_error(y: Tensor, expected: Tensor) -> float:
    """‖y − expected‖ / ‖expected‖."""
    return round(float((y - expected).norm() / expected.norm()), 6)


def _packed(
    case: ModelCase, context: Context, model: nn.Module, x: Tensor
) -> tuple[nn.Module | str, str | None, int | None]:
    try:
        report = own.packed_in_place(model, x, case.dtype, context.threads)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error), None, None
    counts: dict[str, int] = {}
    for row in report.rows:
        counts[row.choice] = counts.get(row.choice, 0) + 1
    words = ", ".join(f"{number} {choice}" for choice, number in sorted(counts.items()))
    words += f"; {len(report.plans)} plans" if report.plans else ""
    return model, words + ("; reverted" if report.reverted else ""), report.bytes_after


def _dense(case: ModelCase, context: Context, model: nn.Module, x: Tensor, stack: ExitStack) -> dict[str, Any]:
    """What does not depend on zeros: torch in several dtypes, our own dense, onnxruntime or llama.cpp, stand-ins."""
    network = case.network
    empty = stand_ins(_shell(model), network)
    offers: dict[str, Any] = {WITHOUT: [lambda: empty(x)]}
    if network.dtype == torch.float32:
        offers["torch fp32"] = [lambda: model(x)]
        if case.dtype == "int8":
            quantised = dynamic_int8_model(model, network.sparse)
            offers["torch int8"] = (
                "no dynamic int8 of convolutions in torch" if quantised is None else [lambda: quantised(x)]
            )
    if case.dtype == "bf16" or network.dtype == torch.bfloat16:
        rounded = copy.deepcopy(model).bfloat16() if network.dtype != torch.bfloat16 else model
        given = x.bfloat16() if x.is_floating_point() else x
        offers["torch bf16"] = [lambda: rounded(given)]
    try:
        ours, _ = own.packed(model, x, case.dtype, context.threads)
        offers[f"{own.DENSE}{case.dtype}"] = [lambda: ours(x)]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        offers[f"{own.DENSE}{case.dtype}"] = str(error)
    if "llama.cpp" in network.peers:
        offers |= _llama(case, context, x, stack)
    elif case.dtype != "bf16":
        offers[f"onnxruntime {case.dtype}"] = _onnxruntime(case, context, model, x)
    return offers


def _shell(model: nn.Module) -> nn.Module:
    """A copy of the model that shares all weights: its layers are about to be replaced."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _onnxruntime(case: ModelCase, context: Context, model: nn.Module, x: Tensor) -> Any:
    if not (context.peers.has("onnxruntime") and context.peers.has("onnx")):
        return context.peers.missing.get("onnxruntime") or context.peers.missing["onnx"]
    try:
        path = export(model, x, context.folder / "dense.onnx")
        if case.dtype == "int8":
            path = onnx_runtime.quantised(path, str(context.folder / "int8.onnx"), {"x": x}, convolutions=x.ndim == 4)
        return [onnx_runtime.runner(path, {"x": x}, context.threads)]
    except (RuntimeError, ValueError, ModuleNotFoundError) as error:
        return f"{type(error).__name__}: {error}"[:300]


def _deepsparse(case: ModelCase, context: Context, model: nn.Module, x: Tensor) -> Any:
    if context.server is None:
        return context.deepsparse("", case.batch)
    try:
        path = export(model, x, context.folder / "sparse.onnx")
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return context.deepsparse(path, case.batch, case.network.below)


def export(model: nn.Module, x: Tensor, path: Path) -> str:
    """The model as an ONNX file, by torch's exporter that needs no other packages; the path."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of being the older of torch's two exporters
        torch.onnx.export(
            model, (x.clone(),), str(path), dynamo=False, opset_version=14, input_names=["x"], output_names=["y"]
        )
    return str(path)


def _llama(case: ModelCase, context: Context, x: Tensor, stack: ExitStack) -> dict[str, Any]:
    missing = context.peers.missing
    found: dict[str, Any] = {}
    for kind in _KINDS[case.dtype]:
        reason = missing.get("llama-cpp-python") or missing.get("gguf")
        if reason is not None:
            found[LLAMA + kind] = reason
            continue
        try:
            decoder = llama.Decoder(llama.write_gguf(context.folder / f"{kind}.gguf", kind), context.threads)
        except RuntimeError as error:
            found[LLAMA + kind] = str(error)
            continue
        stack.callback(decoder.close)
        found[LLAMA + kind] = decoder.calls(x.shape[1])
    return found
