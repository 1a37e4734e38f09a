"""`rarefy.save` and `rarefy.load`: a model with packed layers in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from rarefy.io import container
from rarefy.io.contents import VERSION, Contents, PackedEntry, read
from rarefy.runtime.forms import Stored, from_bytes, runnable, smallest
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import Packed, from_description

Model = TypeVar("Model", bound=nn.Module)
PathLike = str | os.PathLike[str]

_OWN = ("packed_weight", "packed_bias")  # of a packed layer's state: the file has them in its own way


# --- saving ----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: PathLike) -> None:
    """Write a model's state to a safetensors file, its packed layers in their smallest form.

    model: with or without packed layers. Everything in `model.state_dict()` is stored, tied tensors once; a packed
    weight as a bitmap or with 8-bit in-panel indices, whichever is smaller, so that the file serves every machine. Code
    is not stored: `load` fills a model that is built anew. The file is complete or not there: it is written beside
    `path` and renamed. Raises ValueError, before anything is written, for state that is no tensor (`get_extra_state`)
    or that safetensors cannot hold, OSError where the file cannot be written.

    >>> import tempfile, pathlib
    >>> model = torch.nn.Linear(4, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, pathlib.Path(folder) / "model.safetensors")
    ...     sorted(load(pathlib.Path(folder) / "model.safetensors"))
    ['bias', 'weight']
    """
    layers = _packed_layers(model)
    own = {_join(name, each) for names, _ in layers for name in names for each in _OWN}
    state = {name: value for name, value in model.state_dict().items() if name not in own}
    tensors, tied = _untied(_checked(state))
    packed = _store(layers, tensors)
    contents = {"version": VERSION, "packed": [each.model_dump() for each in packed], "tied": tied}
    container.write(Path(path), tensors, contents)


def _packed_layers(model: nn.Module) -> list[tuple[list[str], Packed]]:
    """Each packed layer with all of its names."""
    found: dict[int, tuple[list[str], Packed]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Packed):
            found.setdefault(id(module), ([], module))[0].append(name)
    return list(found.values())


def _store(layers: list[tuple[list[str], Packed]], tensors: dict[str, Tensor]) -> list[PackedEntry]:
    """Add the stored weights and biases to the tensors; layers that share a weight name the same tensor."""
    stored_as: dict[int, str] = {}
    packed: list[PackedEntry] = []
    for names, layer in layers:
        stored, bias = layer.stored, layer.bias
        key = stored.bytes.data_ptr()
        if key not in stored_as:
            stored_as[key] = _free(_join(names[0], "packed"), tensors)
            tensors[stored_as[key]] = smallest(stored).bytes
        bias_name = None if bias is None else _free(_join(names[0], "bias"), tensors)
        if bias is not None and bias_name is not None:
            tensors[bias_name] = bias
        packed.append(
            PackedEntry(
                names=names, tensor=stored_as[key], bias=bias_name, form=int(stored.form), block=stored.block,
                description=layer.describe(),
            )
        )  # fmt: skip
    return packed


def _checked(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name!r} in the model's state is no tensor but {type(value).__name__}, and files hold tensors alone: "
                "nothing is pickled. Let get_extra_state return a tensor, or save that part by itself."
            )
        reason = container.is_storable(value)
        if reason:
            raise ValueError(f"{name!r} cannot be saved: {reason}. Make it a plain tensor that has values first.")
    return cast("dict[str, Tensor]", dict(state))


def _untied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without repetitions, and the names that were left out with the name each is stored under."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        key = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
    return {name: tensor for name, tensor in state.items() if name not in tied}, tied


def _free(name: str, tensors: Mapping[str, Tensor]) -> str:
    while name in tensors:
        name += "_"
    return name


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


# --- loading ---------------------------------------------------------------------------------------------------------


@overload
def load(path: PathLike, model: None = None, *, verify: bool = True) -> dict[str, Tensor]: ...
@overload
def load(path: PathLike, model: Model, *, verify: bool = True) -> Model: ...
def load(path: PathLike, model: nn.Module | None = None, *, verify: bool = True) -> nn.Module | dict[str, Tensor]:
    """Load what `rarefy.save` wrote: into a dense model of the same architecture, or as a state dict.

    model: built as the saved one was before it was packed, its values are of no matter (a model on the meta device
    serves). In place, the layers that were packed become packed again, the other tensors take the file's values and
    dtypes, tied ones are tied again; it is returned. Packed layers run in the form that they had, by its usual kernels:
    what `rarefy.pack` measured belongs to its machine and is not stored. Without a model the result is the state dict
    of the dense model, packed weights unpacked (files hold no code, so that no model can be built from one).
    verify: compare each tensor's checksum, which reads the whole file (about 0.3 s per GB). Sizes and indices are
    checked in any case. Tensors lie on a private map of the file, a bitmap runs from it without a copy: replace the
    file (`save` does so), never write into it, while the model lives.
    Raises ValueError, with the model as it was, where the file is damaged, foreign or of another version, or belongs to
    another architecture.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(torch.nn.Linear(4, 2), pathlib.Path(folder) / "model.safetensors")
    ...     load(pathlib.Path(folder) / "model.safetensors", torch.nn.Linear(4, 2))
    Linear(in_features=4, out_features=2, bias=True)
    """
    reader = container.Reader(Path(path), verify=verify)
    with _said_by(reader.path):
        contents = read(reader.contents)
        weights = {each.tensor: from_bytes(reader.tensor(each.tensor)) for each in contents.packed}
        dense = _dense(reader, contents)
        if model is not None:
            _check_architecture(model, contents, weights, dense)
        layers = _layers(reader, contents, weights)
        if model is None:
            return dense | {name: value for layer in layers for name, value in layer.unpacked()}
        modules = dict(model.named_modules(remove_duplicate=False))
        for layer in layers:
            for name in layer.entry.names:
                layer.check(name, modules[name])
    for layer in layers:
        for name in layer.entry.names:
            layer.fill(modules[name])
    model.load_state_dict(dense, strict=False, assign=True)
    _tie(model, contents.tied)
    return model


class _Layer(NamedTuple):
    """A packed layer of a file: what is said of it, its weight as it runs, its bias, and a layer of them by itself."""

    entry: PackedEntry
    stored: Stored
    bias: Tensor | None
    packed: Packed

    def unpacked(self) -> Iterator[tuple[str, Tensor]]:
        """Names and dense tensors."""
        weight = self.packed.weight
        for name in self.entry.names:
            yield _join(name, "weight"), weight
            if self.bias is not None:
                yield _join(name, "bias"), self.bias

    def check(self, name: str, module: nn.Module) -> None:
        """Raises ValueError where a layer of the model is not the one that was packed."""
        plain = self.packed.plain
        if not isinstance(module, plain):
            raise ValueError(f"{name!r} is a {plain.__name__} in the file, a {type(module).__name__} in the model")
        said = {**_USUAL, **self.entry.description, "bias": self.bias is not None}
        seen = {"bias": module.bias is not None} | {key: getattr(module, key) for key in said.keys() & vars(module)}
        other = [f"{key} {said[key]} in the file, {seen[key]} in the model" for key in seen if _differ(said, seen, key)]
        if other:
            raise ValueError(f"{name!r} is another layer: {'; '.join(sorted(other))}. Build the model that was saved.")

    def fill(self, module: Any) -> None:
        """Make a dense layer this packed one, in place, so that hooks and references stay."""
        if isinstance(module, Packed):
            return  # under another name already
        said = cast("dict[str, Any]", self.entry.description)
        dtype, trained = said.get("weight_dtype", "float32"), [*said.get("trained", ()), False, False]
        weight = torch.empty(module.weight.shape, dtype=getattr(torch, dtype), device="meta")
        module.weight = nn.Parameter(weight, requires_grad=bool(trained[0]))
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias, requires_grad=bool(trained[1]))
        type(self.packed).convert(module, self.stored)


_USUAL = {"groups": 1, "dilation": [1, 1], "padding_mode": "zeros"}
"""What a packed convolution is without saying so."""


def _differ(said: Mapping[str, Any], seen: Mapping[str, Any], key: str) -> bool:
    value = seen[key]
    return said[key] != (list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value)


def _layers(reader: container.Reader, contents: Contents, weights: Mapping[str, Stored]) -> list[_Layer]:
    """The packed layers of a file. Those that share a weight share what it is made into."""
    made: dict[tuple[str, int, int], Stored] = {}
    layers: list[_Layer] = []
    for entry in contents.packed:
        key = (entry.tensor, entry.form, entry.block)
        if key not in made:
            made[key] = runnable(weights[entry.tensor], Form(entry.form), entry.block)
        bias = None if entry.bias is None else reader.tensor(entry.bias)
        layers.append(_Layer(entry, made[key], bias, _alone(entry, made[key], bias)))
    return layers


def _alone(entry: PackedEntry, stored: Stored, bias: Tensor | None) -> Packed:
    try:
        return from_description(stored, bias=bias, **cast("dict[str, Any]", entry.description))
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{entry.description} describes no packed layer: the file is damaged ({error})") from error


def _dense(reader: container.Reader, contents: Contents) -> dict[str, Tensor]:
    """The tensors that are not of packed layers, under all of their names."""
    others = {each.tensor for each in contents.packed} | {each.bias for each in contents.packed}
    dense = {name: reader.tensor(name) for name in reader.names() if name not in others}
    lost = sorted(set(contents.tied.values()) - dense.keys())
    if lost:
        raise ValueError(f"there is no tensor {lost[0]!r} in it, which others are tied to: the file is damaged")
    return dense | {name: dense[first] for name, first in contents.tied.items()}


def _check_architecture(
    model: nn.Module, contents: Contents, weights: Mapping[str, Stored], dense: Mapping[str, Tensor]
) -> None:
    """Raises ValueError where a model lacks what is in the file, has more, or has it in other sizes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    expected = model.state_dict()
    for entry in contents.packed:
        for name in entry.names:
            _check_weight(name, modules.get(name), weights[entry.tensor])
            for leaf in ("weight", "bias"):
                expected.pop(_join(name, leaf), None)
    missing, unknown = sorted(expected.keys() - dense.keys()), sorted(dense.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the model is another one: {_some(missing)} not in the file, {_some(unknown)} not in the model. Build the "
            "model as the saved one was before it was packed."
        )
    for name, tensor in dense.items():
        if expected[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)} in the file, {tuple(expected[name].shape)} in the model"
            )


def _check_weight(name: str, module: nn.Module | None, stored: Stored) -> None:
    if isinstance(module, Packed):
        raise ValueError(f"{name!r} of the model is packed already: load into a dense one (rarefy.unpack(model))")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"{name!r} is a packed layer in the file; the model has no layer with a weight of that name")
    if stored.shape != (weight.shape[0], weight[0].numel()):
        raise ValueError(f"{name!r} has a weight of {stored.shape} in the file, of {tuple(weight.shape)} in the model")


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Make parameters that were one parameter one again."""
    for name, first in tied.items():
        holder, _, leaf = name.rpartition(".")
        there, _, its_leaf = first.rpartition(".")
        parameters = model.get_submodule(holder)._parameters
        its = model.get_submodule(there)._parameters
        if leaf in parameters and its_leaf in its:
            parameters[leaf] = its[its_leaf]


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")


@contextmanager
def _said_by(path: Path) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}") from error
