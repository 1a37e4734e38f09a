"""Four layers with bias and ReLU, one after the other: Linears, and 1×1 convolutions; fp32, against DeepSparse.

Times are per layer, and per image for convolutions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.cpu import own
from rarefy.bench.cpu.cases import Zeros, make_weight
from rarefy.bench.cpu.context import Context
from rarefy.bench.cpu.document import LAYER, Row, make_row
from rarefy.bench.cpu.matrices import limits, sort_out
from rarefy.bench.cpu.peers import graphs, onnx_runtime
from rarefy.bench.cpu.timing import Samples, measure
from rarefy.bench.seeds import generator

__all__ = ["Chain", "chains", "measure_chain"]

_DEPTH = 4


@dataclass(frozen=True)
class Chain:
    """Four layers of `width` features. side: of the images of 1×1 convolutions; None for Linears."""

    width: int
    batch: int
    zeros: Zeros
    side: int | None = None

    @property
    def name(self) -> str:
        """As in "4 × Linear 1024" or "4 × conv 512 @ 14²"."""
        kind = f"Linear {self.width}" if self.side is None else f"conv {self.width} @ {self.side}²"
        return f"{_DEPTH} × {kind}"

    @property
    def columns(self) -> int:
        """Tokens, or pixels of all images."""
        return self.batch * (1 if self.side is None else self.side**2)


def chains(*, quick: bool = False) -> list[Chain]:
    """The chains that DeepSparse's published strength was measured on."""
    if quick:
        dense = [Chain(1024, batch, Zeros("unstructured", 0.9)) for batch in (1, 128)]
        return [*dense, Chain(512, 1, Zeros("unstructured", 0.9), side=14)]
    linears = [
        Chain(width, batch, Zeros("unstructured", sparsity))
        for width, sparsities in ((1024, (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)), (4096, (0.5, 0.8, 0.9, 0.95)))
        for batch in (1, 32, 128, 512)
        for sparsity in sparsities
    ]
    convolutions = [
        Chain(width, batch, Zeros("unstructured", sparsity), side)
        for width, side in ((256, 14), (512, 14), (1024, 7))
        for batch in (1, 16)
        for sparsity in (0.7, 0.8, 0.9, 0.95)
    ]
    return [*linears, *convolutions]


def measure_chain(chain: Chain, context: Context) -> Row:
    """One row; all candidates interleaved, DeepSparse in its own process."""
    context.say(f"{chain.name} batch {chain.batch} {chain.zeros}")
    source = generator(f"cpu {chain.name}", 0)
    weights = [make_weight(chain.width, chain.width, chain.zeros, source)[0] for _ in range(_DEPTH)]
    biases = [torch.randn(chain.width, generator=source) * 0.1 for _ in weights]
    sizes = (chain.batch, chain.width) if chain.side is None else (chain.batch, chain.width, chain.side, chain.side)
    x = torch.randn(sizes, generator=source)
    nonzeros = sum(int((w != 0).sum()) for w in weights)
    with torch.inference_mode():
        offers, choice = _offers(chain, context, weights, biases, x)
        candidates, left_out = sort_out(offers)
        samples, slow = measure(candidates, context.plan)
    context.forget()
    share = _DEPTH * (1 if chain.side is None else chain.batch)
    samples = {name: Samples(tuple(s / share for s in taken.seconds), taken.calls) for name, taken in samples.items()}
    row = Row(
        section="chain", name=chain.name, shape=[chain.width, chain.width], batch=chain.batch, regime="hot",
        dtype="fp32", pattern=chain.zeros.pattern, sparsity=chain.zeros.sparsity, nonzeros=nonzeros // _DEPTH,
        operations=2.0 * nonzeros * chain.columns / share, choice=choice,
        left_out={**left_out, **slow},
    )  # fmt: skip
    return limits(make_row(row, samples, {}), context)


def _offers(
    chain: Chain, context: Context, weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor
) -> tuple[dict[str, Any], str | None]:
    model = _module(weights, biases, chain.side)
    offers: dict[str, Any] = {"torch fp32": [lambda: model(x)]}
    graph = _graph(chain, weights, biases) if context.peers.has("onnx") else None
    if context.peers.has("onnxruntime") and graph is not None:
        offers["onnxruntime fp32"] = [onnx_runtime.runner(graph, {"x": x}, context.threads)]
    offers["DeepSparse"] = (
        context.peers.missing.get("onnx", "") if graph is None else context.deepsparse(graph, chain.batch)
    )
    try:
        packed, report = own.packed(model, x, "fp32", context.threads)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        offers[LAYER] = str(error)
        return offers, None
    offers[LAYER] = [lambda: packed(x)]
    planned = f"; {len(report.plans)} plans" if report.plans else ""
    return offers, ", ".join(dict.fromkeys(row.choice for row in report.rows)) + planned


def _module(weights: Sequence[Tensor], biases: Sequence[Tensor], side: int | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for w, b in zip(weights, biases, strict=True):
        out, inputs = w.shape
        layer: nn.Linear | nn.Conv2d = nn.Linear(inputs, out) if side is None else nn.Conv2d(inputs, out, 1)
        layer.weight = nn.Parameter(w.clone().view(layer.weight.shape), requires_grad=False)
        layer.bias = nn.Parameter(b.clone(), requires_grad=False)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def _graph(chain: Chain, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bytes | None:
    arrays = [w.numpy() for w in weights]
    if chain.side is None:
        return graphs.linear_chain(arrays, chain.batch, [b.numpy() for b in biases], relu=True)
    shaped = [a.reshape(*a.shape, 1, 1) for a in arrays]
    return graphs.conv_chain(shaped, [b.numpy() for b in biases], chain.batch, chain.side)
