"""Single matrices: y = x Wᵀ for the cells of cases.py, with all candidates of a dtype interleaved."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rarefy.bench.cpu import own
from rarefy.bench.cpu.cases import Cell, Zeros, make_weight
from rarefy.bench.cpu.context import Context
from rarefy.bench.cpu.dense import copies, dynamic_int8, torch_csr, torch_dense
from rarefy.bench.cpu.document import Row, make_row
from rarefy.bench.cpu.peers import ggml, graphs, onnx_runtime, propagation
from rarefy.bench.cpu.timing import Candidate, Local, measure
from rarefy.bench.seeds import generator

__all__ = ["LLAMA", "measure_cell"]

LLAMA = "llama.cpp "
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
_MOST_SESSIONS = 48
_DEEPSPARSE = {((1024, 1024), batch) for batch in (1, 32, 128, 512)} | {((4096, 4096), b) for b in (1, 32, 128, 512)}
_LLAMA_TYPES = {"fp32": (), "bf16": ("BF16",), "int8": ("Q8_0", "Q4_0")}

Offers = Mapping[str, Any]  # candidate to calls, to a Candidate, or to the reason why there is none


def measure_cell(cell: Cell, context: Context) -> Iterator[Row]:
    """One row for each of the cell's zeros."""
    source = generator(f"cpu {cell.name}", 0)
    x = torch.randn(cell.batch, cell.inputs, generator=source)
    whole, _ = make_weight(cell.out, cell.inputs, Zeros("unstructured", 0.0), source)
    with torch.inference_mode(), ExitStack() as stack:
        dense = _dense(cell, context, whole, x, stack)
        for zeros in cell.zeros:
            context.say(f"{cell} {zeros}")
            weight, mask = make_weight(cell.out, cell.inputs, zeros, source)
            offers, choice, chosen = _sparse(cell, context, zeros, (weight, mask), x)
            row = _row(cell, context, zeros, {**dense, **offers}, int(mask.sum()), choice)
            yield row if chosen is None else row.model_copy(update={"facts": {**row.facts, own.CHOSEN: chosen}})
            context.forget()


def _row(cell: Cell, context: Context, zeros: Zeros, offers: Offers, nonzeros: int, choice: str | None) -> Row:
    candidates, left_out = sort_out(offers)
    samples, slow = measure(candidates, context.plan)
    row = Row(
        section="matrix", name=cell.name, shape=[cell.out, cell.inputs], batch=cell.batch, regime=cell.regime,
        dtype=cell.dtype, pattern=zeros.pattern, sparsity=zeros.sparsity, held_out=cell.held_out, nonzeros=nonzeros,
        operations=2.0 * nonzeros * cell.batch, bytes=_fewest_bytes(cell, zeros, nonzeros), choice=choice,
        left_out={**left_out, **slow},
    )  # fmt: skip
    return limits(make_row(row, samples, {}), context)


def limits(row: Row, context: Context) -> Row:
    """The row with the share of the peak reached by what stands for rarefy, and the time over the byte floor."""
    name = row.own()
    if name is None:
        return row
    seconds = row.times[name].minimum * 1e-6
    facts = dict(row.facts)
    share = context.machine.share(row.dtype, row.operations, seconds)
    floor = None if row.bytes is None else context.machine.floor(row.bytes)
    if share is not None:
        facts["share of peak"] = round(share, 4)
    if floor is not None:
        facts["byte floor µs"] = round(floor * 1e6, 2)
        facts["over byte floor"] = round(seconds / floor, 3)
    return row.model_copy(update={"facts": facts})


def sort_out(offers: Offers) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Candidates that can be timed, and the reasons why the others cannot."""
    left_out = {name: offer for name, offer in offers.items() if isinstance(offer, str)}
    candidates: dict[str, Candidate] = {
        name: Local(tuple(offer)) if isinstance(offer, list) else offer
        for name, offer in offers.items()
        if not isinstance(offer, str)
    }
    return candidates, left_out


def _fewest_bytes(cell: Cell, zeros: Zeros, nonzeros: int) -> int:
    """Bytes of the smaller of the two runnable forms, bitmap and 16-bit index per unit, with their row starts."""
    bitmap = -(-cell.inputs // 64) * 8 * cell.out + 4 * cell.out
    index = 2 * nonzeros // zeros.block + 4 * cell.out // zeros.block
    scales = 4 * cell.out if cell.dtype == "int8" else 0
    return nonzeros * _BYTES[cell.dtype] + min(bitmap, index) + scales


def _dense(cell: Cell, context: Context, weight: Tensor, x: Tensor, stack: ExitStack) -> dict[str, Any]:
    count = _counter(cell, context)
    dense: dict[str, Any] = {"torch fp32": torch_dense(weight, x, torch.float32, count(4 * weight.numel()))}
    dense |= own.dense_kernels(weight, x, cell.dtype, count, context.threads)
    if cell.dtype == "bf16":
        dense["torch bf16"] = torch_dense(weight, x, torch.bfloat16, count(2 * weight.numel()))
    elif cell.dtype == "int8":
        dense["torch int8"] = dynamic_int8(weight, x, count(weight.numel()))
    dense |= _onnxruntime(cell, context, weight, x, count)
    if cell.batch == 1:
        dense |= _llama(cell, context, weight, x, count, stack)
    return dense


def _counter(cell: Cell, context: Context) -> Callable[[int], int]:
    return lambda nbytes: copies(nbytes, context.machine.cache, cell.regime)


def _onnxruntime(
    cell: Cell, context: Context, weight: Tensor, x: Tensor, count: Callable[[int], int]
) -> dict[str, Any]:
    name = f"onnxruntime {cell.dtype}"
    if cell.dtype == "bf16":
        return {}
    if not (context.peers.has("onnxruntime") and context.peers.has("onnx")):
        return {name: context.peers.missing.get("onnxruntime") or context.peers.missing["onnx"]}
    array = weight.numpy()
    graph = graphs.int8_linear(array, cell.batch) if cell.dtype == "int8" else graphs.linear_chain([array], cell.batch)
    number = min(_MOST_SESSIONS, count(weight.numel() * _BYTES[cell.dtype]))
    return {name: [onnx_runtime.runner(graph, {"x": x}, context.threads) for _ in range(number)]}


def _llama(
    cell: Cell, context: Context, weight: Tensor, x: Tensor, count: Callable[[int], int], stack: ExitStack
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in _LLAMA_TYPES[cell.dtype]:
        reason = context.peers.missing.get("llama-cpp-python") or ggml.fits(kind, *weight.shape)
        if reason is not None:
            found[LLAMA + kind] = reason
            continue
        number = count(int(weight.numel() * {"BF16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}[kind]))
        product = ggml.Product([weight] * number, x, kind, context.threads)
        stack.callback(product.close)
        found[LLAMA + kind] = product.calls
    return found


def _sparse(
    cell: Cell, context: Context, zeros: Zeros, weight: tuple[Tensor, Tensor], x: Tensor
) -> tuple[dict[str, Any], str | None, str | None]:
    w, mask = weight
    count = _counter(cell, context)
    found = own.sparse_kernels(w, mask, zeros, x, cell.dtype, count, context.threads)
    nonzeros = int(mask.sum())
    nbytes = _fewest_bytes(cell, zeros, nonzeros)
    layer, choice, chosen = own.pack_layer(w, x, cell.dtype, nbytes, count(nbytes), context.threads)
    found |= layer
    if cell.dtype != "fp32":
        return found, choice, chosen
    found["torch CSR"] = torch_csr(w, x, count(12 * nonzeros))  # torch's indices have 64 bits
    if cell.regime == "hot":
        found["sparseprop"] = propagation.layer(w, x, context.peers)
        if ((cell.out, cell.inputs), cell.batch) in _DEEPSPARSE:
            graph = graphs.linear_chain([w.numpy()], cell.batch)
            found["DeepSparse"] = context.deepsparse(graph, cell.batch)
    return found, choice, chosen
