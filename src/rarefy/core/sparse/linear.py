"""`SparseLinear`: what an `nn.Linear` is while it runs sparse, and how it comes to be one and ceases to be.

Module and Parameter keep their identity: hooks, optimizers and lists of parameters made before still hold. The
Parameter is called `values` meanwhile and is the vector of the non-zeros, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rarefy.core.sparse import kernels
from rarefy.core.sparse.structure import Structure

DTYPES = (torch.float32, torch.float64)


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b with gradients for x, the values of W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseLinear, fast: bool) -> Tensor:
        x = kernels.walkable(x)
        structure = layer.structure
        y = kernels.empty(len(x), structure.rows, x, feature_major=fast)
        kernels.multiply(values, structure.by_row, x, y, bias)
        ctx.save_for_backward(x, values)  # whoever moves the structure writes to the values: a stale graph is refused
        ctx.layer, ctx.structure, ctx.fast = layer, structure, fast
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = gradients
        x, values = ctx.saved_tensors
        layer: SparseLinear = ctx.layer
        structure: Structure = ctx.structure
        wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
        dy = kernels.walkable(dy)
        dx = dvalues = None
        if wants_x:
            dx = kernels.empty(len(dy), structure.cols, dy, feature_major=ctx.fast)
            kernels.multiply(kernels.permute(values, structure.order), structure.by_column, dy, dx)
        if wants_values:
            dvalues = kernels.weight_gradient(structure.by_row, x, dy)
            if layer.gathers is not None:
                layer.gathers(x, dy)
        return dx, dvalues, dy.sum(0) if wants_bias else None, None, None


class SparseLinear(nn.Linear):
    """A Linear of which only the non-zeros exist: y = x Wᵀ + b, W given by `values` and `structure`.

    values: Parameter (non-zeros,), float32 or float64, on the CPU. `weight` reads as the dense matrix, made anew each
    time. `state_dict` holds values, bias and the structure (`columns` uint16, `starts` uint32); loading takes those, of
    another structure too, or a dense `weight` that is zero where this structure keeps nothing. For a matrix of samples
    the output is the transposed view of a feature-major buffer, which elementwise operations pass on: no layer
    transposes. Further leading axes come out in torch's own order.

    Made by `rarefy.sparsify(..., execution="sparse")`, not by hand.
    """

    values: nn.Parameter
    structure: Structure
    gathers: Any  # called with the input and the gradient of the output where a dense gradient is wanted
    waits: bool  # for the weights of the moment that a handle was resumed from

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError('SparseLinear is made of an nn.Linear, by rarefy.sparsify(model, method, execution="sparse").')

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense matrix (out, in), without a graph, made anew each time."""
        return dense_like(self.values.detach(), self.structure)

    # As torch.compiler.disable, which would import torch.compile with this module: half a second for every user.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out). Raises TypeError for another dtype or device than that of the values."""
        values = self.values
        if input.dtype is not values.dtype or not input.is_cpu:
            input = self._fitting(input)
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"{self} takes inputs of {self.in_features} features, got shape {tuple(input.shape)}.")
        if input.ndim == 2:
            return _product(input, values, self.bias, self, True)
        flat = _product(input.reshape(-1, self.in_features), values, self.bias, self, False)
        return flat.view(*input.shape[:-1], self.out_features)

    def _fitting(self, input: Tensor) -> Tensor:
        values = self.values
        if torch.is_autocast_enabled("cpu") and input.is_cpu and input.is_floating_point() and values.is_cpu:
            return input.to(values.dtype)  # sparse layers run in their own precision
        raise TypeError(
            f"{self} runs on the CPU in the dtype of its values, {values.dtype} on {values.device} (float32 or "
            f"float64); got {input.dtype} on {input.device}. Convert the input, or end() the sparse run before moving "
            "or casting the model."
        )

    def extra_repr(self) -> str:
        bias = self.bias is not None  # pyright: ignore[reportUnnecessaryComparison]
        return f"{self.in_features}, {self.out_features}, bias={bias}, nonzeros={self.values.numel()}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Casts and moves that a sparse layer cannot follow (`.half()`, `.to("cuda")`) are refused."""
        probe = fn(self.values.detach()[:0])
        if probe.dtype not in DTYPES or probe.device.type != "cpu":
            raise TypeError(
                f"{self} runs sparse, on the CPU in float32 or float64, and cannot become {probe.dtype} on "
                f"{probe.device}: end() the handle first."
            )
        return cast(Any, super())._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "gathers": None}  # a copy belongs to no handle

    # -- its state -----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        cast(Any, super())._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "columns"] = self.structure.by_row.columns
        destination[prefix + "starts"] = self.structure.by_row.starts

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            values, structure = self._read(own, prefix)
        except KeyError as error:
            missing_keys.append(str(error.args[0]))
            return
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {error}.")
            return
        own[prefix + "values"] = values
        if values.shape != self.values.shape:
            exchange_data(self.values, values.detach().to(self.values.dtype).clone())
        self.structure.become(structure)
        self.waits = False
        for name in ("columns", "starts", "weight"):
            own.pop(prefix + name, None)
        rest = strict, missing_keys, unexpected_keys, error_msgs
        cast(Any, super())._load_from_state_dict(own, prefix, local_metadata, *rest)

    def _read(self, own: Mapping[str, Any], prefix: str) -> tuple[Tensor, Structure]:
        """Values and structure of a saved state; KeyError names what is missing, ValueError says what is wrong."""
        if prefix + "weight" in own and prefix + "values" not in own:
            return self._read_dense(own[prefix + "weight"]), self.structure
        values, columns, starts = (own[prefix + name] for name in ("values", "columns", "starts"))
        structure = Structure.of_columns(columns, starts, self.out_features, self.in_features)
        if tuple(values.shape) != (structure.nonzeros,):
            raise ValueError(f"{structure.nonzeros} columns need as many values, got shape {tuple(values.shape)}")
        return values, structure

    def _read_dense(self, weight: Tensor) -> Tensor:
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"a dense weight of shape {tuple(weight.shape)} for {self}")
        wrong = int(weight.ne(0).sum()) - int((values := weight.reshape(-1)[self.structure.positions()]).ne(0).sum())
        if wrong:
            raise ValueError(f"{wrong} entries of a dense weight are not zero where this structure keeps nothing")
        return values


_product = cast(Any, _Product).apply


def dense_like(values: Tensor, structure: Structure, fill: float = 0.0) -> Tensor:
    """The dense matrix of these values, `fill` elsewhere."""
    dense = values.new_full((structure.rows * structure.cols,), fill)
    dense[structure.positions()] = values
    return dense.view(structure.rows, structure.cols)


def to_sparse(linear: nn.Linear, structure: Structure) -> SparseLinear:
    """Turn a Linear into a SparseLinear in place: what lies outside of the structure is gone, a gradient's part too."""
    positions = structure.positions()
    weight = linear.get_parameter("weight")
    grad = None if weight.grad is None else weight.grad.detach().reshape(-1)[positions]
    exchange_data(weight, weight.detach().reshape(-1)[positions], grad)
    _rename(linear, "weight", "values")
    linear.__class__ = SparseLinear
    assert isinstance(linear, SparseLinear)
    linear.structure, linear.gathers, linear.waits = structure, None, False
    return linear


def to_dense(model: nn.Module) -> None:
    """Make every SparseLinear of a model an ordinary Linear again, in place, with exact zeros.

    What `Sparsity.end()` does, for a model whose handle is gone. Optimizers start anew.
    """
    for module in model.modules():
        if isinstance(module, SparseLinear):
            restore(module)


def restore(layer: nn.Linear) -> None:
    """The inverse of `to_sparse`, for a SparseLinear."""
    assert isinstance(layer, SparseLinear)
    values, structure = layer.values, layer.structure
    grad = None if values.grad is None else dense_like(values.grad.detach(), structure)
    exchange_data(values, layer.weight, grad)
    del layer.structure, layer.gathers, layer.waits
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    _rename(layer, "values", "weight")


def exchange_data(parameter: nn.Parameter, data: Tensor, grad: Tensor | None = None) -> None:
    """Other data, of another shape, in the same Parameter.

    Autograd remembers the shape for as long as some graph is alive (a loss that the user still holds), unless the dtype
    changes: so it does, for a moment.
    """
    parameter.grad = None
    other = torch.float64 if parameter.dtype is torch.float32 else torch.float32
    parameter.data = torch.empty(0, dtype=other)
    parameter.data = data
    parameter.grad = grad


def _rename(module: nn.Module, old: str, new: str) -> None:
    """The parameters in their order, since optimizers and files go by it."""
    found = list(module.named_parameters(recurse=False, remove_duplicate=False))
    for name, _ in found:
        delattr(module, name)
    for name, parameter in found:
        module.register_parameter(new if name == old else name, parameter)
