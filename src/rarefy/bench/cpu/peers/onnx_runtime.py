"""onnxruntime in this process, as it is by default: its threads go on spinning for a moment after each run.

The pause before each sample (`Plan.settle`) lets them come to rest, so that the next candidate is alone.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.bench.cpu.peers.environments import need

__all__ = ["quantised", "result", "runner", "session"]


def session(model: bytes | str, threads: int) -> Any:
    """An inference session of a graph (its bytes, or the path of its file) on so many threads."""
    onnxruntime = need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def runner(model: bytes | str, inputs: dict[str, Tensor], threads: int) -> Callable[[], list[Any]]:
    """A call that runs the graph on these inputs, which are bound once and not copied; it returns the outputs."""
    onnxruntime = need("onnxruntime")
    run = session(model, threads)
    binding = run.io_binding()
    kept = {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in inputs.items()}
    for name, array in kept.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for output in run.get_outputs():
        binding.bind_output(output.name)

    def call() -> list[Any]:
        run.run_with_iobinding(binding)
        return binding.get_outputs()

    return call


def result(call: Callable[[], list[Any]]) -> Tensor:
    """The first output of a runner, to check it with."""
    return torch.from_numpy(call()[0].numpy().copy())


class _Once:
    """Calibration data: one set of inputs."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self._inputs: list[dict[str, Any]] = [{name: t.detach().numpy() for name, t in inputs.items()}]

    def get_next(self) -> dict[str, Any] | None:
        """The inputs, then None."""
        return self._inputs.pop() if self._inputs else None


def quantised(source: str, target: str, inputs: dict[str, Tensor], *, convolutions: bool) -> str:
    """The graph file in int8: static with these inputs for convolutions, dynamic for products; the new path."""
    logging.disable(logging.WARNING)  # it recommends a preparation that onnxruntime does by itself when it runs
    try:
        library = need("onnxruntime.quantization")
        kinds = library.QuantType
        if convolutions:
            library.quantize_static(source, target, _Once(inputs), per_channel=True, activation_type=kinds.QUInt8)
        else:
            library.quantize_dynamic(source, target, per_channel=True, weight_type=kinds.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return target
