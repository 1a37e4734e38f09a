"""ONNX graphs of the layers that are compared, built by hand: the same file serves onnxruntime and DeepSparse."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.bench.cpu.peers.environments import need

__all__ = ["conv_chain", "int8_linear", "linear_chain", "save"]

Array = NDArray[np.float32]


def linear_chain(
    weights: Sequence[Array], batch: int, biases: Sequence[Array] | None = None, *, relu: bool = False
) -> bytes:
    """x [batch, in] through products x Wᵀ, W [out, in], each with its bias and ReLU where asked; fp32."""
    helper = need("onnx.helper")
    nodes, constants, value = [], [], "x"
    for i, w in enumerate(weights):
        constants.append(_constant(f"w{i}", np.ascontiguousarray(w.T)))
        inputs, last = [value, f"w{i}"], not relu and i == len(weights) - 1
        if biases is not None:
            constants.append(_constant(f"b{i}", biases[i]))
            inputs.append(f"b{i}")
        value = "y" if last else f"g{i}"
        nodes.append(helper.make_node("MatMul" if biases is None else "Gemm", inputs, [value]))
        if relu:
            out = "y" if i == len(weights) - 1 else f"r{i}"
            nodes.append(helper.make_node("Relu", [value], [out]))
            value = out
    return _model(nodes, constants, [batch, weights[0].shape[1]], [batch, weights[-1].shape[0]])


def conv_chain(weights: Sequence[Array], biases: Sequence[Array], images: int, side: int) -> bytes:
    """x [images, channels, side, side] through 1×1 convolutions, W [out, in, 1, 1], each with bias and ReLU; fp32."""
    helper = need("onnx.helper")
    nodes, constants, value = [], [], "x"
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        constants += [_constant(f"w{i}", w), _constant(f"b{i}", b)]
        end = "y" if i == len(weights) - 1 else f"r{i}"
        nodes.append(helper.make_node("Conv", [value, f"w{i}", f"b{i}"], [f"c{i}"], kernel_shape=[1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [end]))
        value = end
    shape = [images, weights[0].shape[1], side, side]
    return _model(nodes, constants, shape, [images, weights[-1].shape[0], side, side])


def int8_linear(weight: Array, batch: int) -> bytes:
    """x [batch, in] · Wᵀ with dynamic quantisation: x to uint8 per tensor, W [out, in] to int8 per output."""
    helper = need("onnx.helper")
    scales = np.maximum(np.abs(weight).max(1), 1e-12) / 127
    integers = np.rint(weight / scales[:, None]).astype(np.int8)
    constants = [
        _constant("w", np.ascontiguousarray(integers.T)),
        _constant("zero", np.zeros((), np.int8)),
        _constant("ws", scales.astype(np.float32)),
    ]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z", "zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=1),
        helper.make_node("Mul", ["s", "ws"], ["scale"]),
        helper.make_node("Mul", ["f", "scale"], ["y"]),
    ]
    return _model(nodes, constants, [batch, weight.shape[1]], [batch, weight.shape[0]])


def save(model: bytes, path: str) -> str:
    """Write a graph to a file; returns the path."""
    with open(path, "wb") as file:
        file.write(model)
    return path


def _constant(name: str, array: NDArray[Any]) -> Any:
    return need("onnx.numpy_helper").from_array(np.ascontiguousarray(array), name)


def _model(nodes: list[Any], constants: list[Any], given: list[int], made: list[int]) -> bytes:
    helper, real = need("onnx.helper"), need("onnx").TensorProto.FLOAT
    x = helper.make_tensor_value_info("x", real, given)
    y = helper.make_tensor_value_info("y", real, made)
    graph = helper.make_graph(nodes, "layers", [x], [y], constants)
    # Old enough for DeepSparse 1.8.0, which reads opset 13.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()
