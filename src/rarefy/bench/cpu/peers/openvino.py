"""OpenVINO in this process: a graph file compiled for the processor, in the precision that is asked for.

A graph that onnxruntime's static quantisation has written, with pairs of quantise and dequantise, runs in int8.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.bench.cpu.peers.environments import need

__all__ = ["compiled", "quantised", "result", "runner"]


def compiled(path: str, threads: int) -> Any:
    """The graph compiled for low latency on so many threads; what is not quantised stays in float32."""
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return need("openvino").Core().compile_model(path, "CPU", settings)


def runner(model: Any, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """A call that runs the compiled graph on these inputs, which are bound once and not copied."""
    library = need("openvino")
    request = model.create_infer_request()
    for name, tensor in inputs.items():
        request.set_tensor(name, library.Tensor(tensor.detach().contiguous().numpy(), shared_memory=True))
    return request.infer


def result(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first output for these inputs."""
    return torch.from_numpy(model({name: tensor.numpy() for name, tensor in inputs.items()})[0].copy())


def quantised(source: str, target: str, batches: Sequence[dict[str, Tensor]]) -> str:
    """The graph file in int8, weights per output and activations by their range over `batches`; the new path.

    Only products with constant weights are quantised: attention and what lies between stays in float32.
    """
    onnx, library = need("onnx"), need("onnxruntime.quantization")
    graph = onnx.load(source).graph
    constant = {each.name for each in graph.initializer}
    nodes = [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and constant & set(node.input)]
    logging.disable(logging.WARNING)  # it recommends a preparation that changes nothing here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows of weights that are all zero
            library.quantize_static(
                source, target, _Reader(batches), quant_format=library.QuantFormat.QDQ, per_channel=True,
                nodes_to_quantize=nodes, activation_type=library.QuantType.QUInt8, weight_type=library.QuantType.QInt8,
            )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    return target


class _Reader:
    """Calibration data, batch by batch."""

    def __init__(self, batches: Sequence[dict[str, Tensor]]) -> None:
        self._left = [{name: t.numpy() for name, t in inputs.items()} for inputs in reversed(batches)]

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, then None."""
        return self._left.pop() if self._left else None
