"""`Packed`: what all layers have in common that hold their weight in a stored form.

A layer is packed in place: the module stays the same object, with its hooks and its place in the model, and changes its
class. What it holds are bytes (`packed_weight`, `packed_bias`), which `.half()` and `.to(dtype)` leave as they are.
Weights are frozen; gradients flow through to the input. `.weight` and `.bias` read as the unpacked tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rarefy.runtime.engine import Runner
from rarefy.runtime.forms import FileForm, Stored, from_bytes, runnable
from rarefy.runtime.kernels import Form

_WEIGHT, _BIAS = "packed_weight", "packed_bias"


@dataclass(frozen=True)
class Origin:
    """What a layer was before: its class, the dtypes of weight and bias, and which of them were trained."""

    kind: type[nn.Module]
    weight: torch.dtype
    bias: torch.dtype | None
    trained: tuple[bool, bool] = (False, False)


class Packed(nn.Module):
    """A layer with a packed weight, made by `rarefy.pack`, `from_stored` or `convert`; `restore` undoes it."""

    plain: ClassVar[type[nn.Module]]  # the dense class
    packed_weight: Tensor
    packed_bias: Tensor | None
    _origin: Origin
    _ready: Runner | None = None
    _stored: Stored | None = None

    # -- making and unmaking -------------------------------------------------------------------------------------

    @classmethod
    def convert(cls, module: nn.Module, stored: Stored) -> Packed:
        """Turn a dense layer into a packed one, in place, and return it. Its weight and bias are given up.

        stored: its weight, as [rows, cols], in a form that kernels read. Raises ValueError where sizes differ.
        """
        weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module._parameters.get("bias"))
        if stored.shape != (weight.shape[0], weight[0].numel()):
            raise ValueError(f"a stored weight of shape {stored.shape} is none for a weight of {tuple(weight.shape)}")
        packed = cls._of(module, None, None if bias is None else _bytes_of(bias))
        packed._take(stored)
        return packed

    @classmethod
    def _of(cls, module: nn.Module, weight_bytes: Tensor | None, bias_bytes: Tensor | None) -> Packed:
        """The module, of this class from now on, with these bytes in the place of its parameters."""
        parameters: dict[str, Any] = module._parameters
        weight, bias = parameters["weight"], parameters.get("bias")
        origin = Origin(
            type(module), weight.dtype, None if bias is None else bias.dtype,
            (weight.requires_grad, bias is not None and bias.requires_grad),
        )  # fmt: skip
        del parameters["weight"], parameters["bias"]
        module.__class__ = cls
        packed = cast(Packed, module)
        packed._origin = origin
        packed.register_buffer(_WEIGHT, weight_bytes)
        packed.register_buffer(_BIAS, bias_bytes)
        return packed

    @classmethod
    def from_stored(cls, stored: Stored, *, bias: Tensor | None = None, **description: Any) -> Packed:
        """A packed layer by itself, from what `describe` said. stored: in any form, that of a file too.

        Raises ValueError for a description that is not one of this class.
        """
        made = _skeleton(cls, description, bias)
        if isinstance(stored.form, FileForm):
            stored = runnable(stored, Form.INDEX16)
        return cls.convert(made, stored)

    @classmethod
    def hollow(cls, module: nn.Module, length: int) -> Packed:
        """Turn a dense layer into a packed one on the meta device, in place: its values come later, by `fill`.

        length: bytes of the stored weight that will take the place of `packed_weight`. Weight and bias of the layer are
        given up; their dtypes and what is trained stay as they are.
        """
        bias = cast("Tensor | None", module._parameters.get("bias"))
        room = None if bias is None else _empty(bias.numel() * bias.element_size())
        return cls._of(module, _empty(length), room)

    def fill(self, form: Form, block: int) -> None:
        """Run what now lies in `packed_weight`, in any form, that of a file too, as this form.

        Raises ValueError, with the layer as it was, for damaged bytes and for sizes that are not the layer's.
        """
        stored = from_bytes(self.packed_weight.detach())
        rows, *rest = self._weight_shape()
        if stored.shape != (rows, torch.Size(rest).numel()):
            raise ValueError(f"a stored weight of shape {stored.shape} is none for a layer of {(rows, *rest)}")
        self._take(runnable(stored, form, block))

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of `weight`, without unpacking it."""
        return self._origin.weight

    def restore(self) -> nn.Module:
        """Turn it back into what it was, in place: the same values bit for bit, or those that they were cast to."""
        origin, weight, bias = self._origin, self.weight, self.bias
        state: dict[str, Any] = self.__dict__
        for name in ("_origin", "_ready", "_stored", *self._extras()):
            state.pop(name, None)
        for name in (_WEIGHT, _BIAS):
            del self._buffers[name]
        others = dict(self._parameters)
        self._parameters.clear()
        module = cast(nn.Module, self)
        module.__class__ = origin.kind
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=origin.trained[0]))
        module.register_parameter("bias", None if bias is None else nn.Parameter(bias, origin.trained[1]))
        module._parameters.update(others)
        return module

    def describe(self) -> dict[str, Any]:
        """What `from_stored` needs beside the stored weight and the bias: JSON values."""
        trained = list(self._origin.trained)
        return {"weight_dtype": str(self._origin.weight).removeprefix("torch."), "trained": trained}

    def extra_repr(self) -> str:
        """What is held."""
        if self.packed_weight.is_meta:
            return "no values"
        stored = self.stored
        return f"{stored.form.name.lower()}, {stored.dtype.name.lower()}, {stored.units * stored.block} kept"

    def _extras(self) -> tuple[str, ...]:
        """The attributes that a dense layer has not."""
        return ("_form", "_algorithms", "table", "way")

    # -- what it holds -------------------------------------------------------------------------------------------

    @property
    def stored(self) -> Stored:
        """The weight in its stored form. Raises RuntimeError on the meta device, ValueError for damaged bytes."""
        if self._stored is None:
            if self.packed_weight.is_meta:
                raise RuntimeError("this packed layer is on the meta device and has no values: load its state first")
            found = from_bytes(self.packed_weight.detach())
            self._take(runnable(found, Form.INDEX16) if isinstance(found.form, FileForm) else found, keep=True)
        return cast(Stored, self._stored)

    @property
    def weight(self) -> Tensor:
        """The unpacked weight, a fresh tensor without gradient: in the dtype that it had, dequantised."""
        shape = self._weight_shape()
        if self.packed_weight.is_meta:
            return torch.empty(shape, dtype=self._origin.weight, device="meta")
        return self.stored.dense().to(self._origin.weight).view(shape)

    @property
    def bias(self) -> Tensor | None:
        """The bias, a fresh tensor without gradient, in the dtype that it had; None where there is none."""
        if self.packed_bias is None or self._origin.bias is None:
            return None
        return self.packed_bias.clone().view(self._origin.bias)

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _bias_float(self) -> Tensor | None:
        bias = self.bias
        return None if bias is None else bias.to(torch.float32)

    def _take(self, stored: Stored, *, keep: bool = False) -> None:
        """Hold this weight from now on. keep: choices stay as they are, where the form is the same."""
        before = getattr(self, "_form", None)
        form = (int(stored.form), int(stored.dtype), stored.block)
        self.packed_weight, self._stored, self._ready = stored.bytes, stored, None
        self._form = form
        if not keep or before != form:
            self._choose_plainly(stored)

    def _choose_plainly(self, stored: Stored) -> None:
        raise NotImplementedError

    # -- what torch does with modules ----------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again, which holds addresses."""
        state = self.__dict__.copy()
        state.pop("_ready", None)
        state.pop("_stored", None)
        return state

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"{name} of a packed layer cannot be set: rarefy.unpack(model), set it, and pack again"
            )
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> Packed:
        """Packed weights are frozen. Raises RuntimeError for True."""
        if requires_grad:
            raise RuntimeError("packed weights are frozen: rarefy.unpack(model) makes them parameters that can train")
        super().requires_grad_(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """`.to`, `.half`, `.cuda` and their like: bytes are never cast, and leave the CPU for the meta device only."""
        held = {name: b for name in (_WEIGHT, _BIAS) if (b := self._buffers[name]) is not None}
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.packed_weight.device)).device
        if device.type not in ("cpu", "meta"):
            raise RuntimeError(
                f"a packed layer runs on the CPU and cannot go to {device}: call rarefy.unpack(model) before the move"
            )
        cast(Any, super())._apply(fn, recurse)
        for name, before in held.items():
            if cast(Tensor, self._buffers[name]).dtype != torch.uint8:  # .type(dtype) casts everything
                self._buffers[name] = before.to(device)
        after = self.packed_weight
        if after.is_meta or after.data_ptr() != held[_WEIGHT].data_ptr():
            self._stored = None
        self._ready = None
        return self

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
        """Bytes are validated before they are taken; a dense weight is refused, with what would work."""
        if prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight: the layer is packed and the state is dense. Load it into the dense model "
                "(rarefy.unpack(model), load_state_dict, rarefy.pack(model, example=...))."
            )
            return
        wanted = {_WEIGHT: True, _BIAS: self.packed_bias is not None}
        given = {name: state_dict.get(prefix + name) for name in wanted}
        missing_keys += [prefix + name for name, held in wanted.items() if held and given[name] is None]
        if strict:
            known = {prefix + name for name, held in wanted.items() if held}
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]
        try:
            stored = None if given[_WEIGHT] is None else self._checked_weight(given[_WEIGHT])
            bias = None if given[_BIAS] is None else self._checked_bias(given[_BIAS])
        except ValueError as error:
            error_msgs.append(f"{prefix}{_WEIGHT} or {prefix}{_BIAS}: {error}")
            return
        if stored is not None:
            self._take(stored, keep=True)
        if bias is not None:
            self.packed_bias, self._ready = bias, None

    def _checked_weight(self, data: Any) -> Stored:
        if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.ndim != 1:
            raise ValueError("a packed weight is a 1-D uint8 tensor")
        stored = from_bytes(data.detach().cpu().clone(memory_format=torch.contiguous_format))
        rows, *rest = self._weight_shape()
        if stored.shape != (rows, torch.Size(rest).numel()):
            raise ValueError(f"a stored weight of shape {stored.shape} is none for a layer of {(rows, *rest)}")
        return runnable(stored, Form.INDEX16) if isinstance(stored.form, FileForm) else stored

    def _checked_bias(self, data: Any) -> Tensor | None:
        if self.packed_bias is None:
            return None  # said to be unexpected already
        if not isinstance(data, Tensor) or (data.dtype, data.shape) != (torch.uint8, self.packed_bias.shape):
            raise ValueError(f"the packed bias is uint8 {tuple(self.packed_bias.shape)}")
        return data.detach().cpu().clone()


def _empty(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.uint8, device="meta")


def _bytes_of(bias: Tensor) -> Tensor:
    return bias.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _skeleton(cls: type[Packed], description: Mapping[str, Any], bias: Tensor | None) -> nn.Module:
    """The dense layer of a description, without values."""
    sizes = {k: v for k, v in description.items() if k not in ("kind", "weight_dtype", "trained")}
    sizes = {k: tuple(cast(Any, v)) if isinstance(v, list) else v for k, v in sizes.items()}
    name = str(description.get("weight_dtype", "float32"))
    if name not in _DTYPES:
        raise ValueError(f"weight_dtype={name!r}: a weight is of {', '.join(_DTYPES)}")
    try:
        made: Any = cls.plain(**sizes, bias=bias is not None, device="meta", dtype=_DTYPES[name])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{sizes} does not describe a {cls.plain.__name__}: {error}") from error
    trained = list(description.get("trained", (False, False)))
    made.weight.requires_grad_(bool(trained[0]))
    if bias is not None:
        if bias.shape != made.bias.shape:
            raise ValueError(f"a bias of shape {tuple(bias.shape)} is none for {tuple(made.weight.shape)}")
        made.bias = nn.Parameter(bias.detach(), requires_grad=bool(trained[-1]))
    return made
