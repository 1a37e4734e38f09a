"""transformers' side of packed directories: its quantizer, and models out of directories. Imports transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rarefy.io.architecture import architecture, as_in_files, linear_layers, tied
from rarefy.io.directory import METHOD, stored_dtype
from rarefy.io.folder import staged
from rarefy.io.packed import PackedFiles
from rarefy.io.packing import pack_weight, reason_against
from rarefy.io.shards import Shard, Shards
from rarefy.io.weights import PACKED_BIAS, PACKED_WEIGHT, VERSION, PackedEntry, Said, file_form, read_said
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import Packed, PackedLinear
from rarefy.runtime.pack import unpack

__all__ = ["RarefyConfig", "RarefyQuantizer", "as_in_files", "linear_layers", "load", "packed_state", "save_packed"]

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


class RarefyConfig(QuantizationConfigMixin):
    """What config.json says of a packed directory: `{"quant_method": "rarefy", "version": 1}`, and no more."""

    def __init__(self, version: int = VERSION, **_: Any) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  transformers has an enum of its own
        self.version = version


class RarefyQuantizer(HfQuantizer):
    """Loads packed layers in the place of nn.Linear, and saves them again."""

    requires_calibration = True  # so that a dense directory with quantization_config=RarefyConfig() is refused

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a version that is not known, and for other devices than the CPU."""
        version = getattr(self.quantization_config, "version", None)
        if version != VERSION:
            raise ValueError(
                f"the directory is packed in version {version!r}; this rarefy reads version {VERSION}. Update rarefy."
            )
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        others = {str(place) for place in places - {None}} - {"cpu", "auto", "meta"}
        if others:
            raise ValueError(
                f"device_map puts parts on {', '.join(sorted(others))}: packed layers run on the CPU. Leave device_map "
                "out, or make the directory dense (rarefy unpack DIR -o DENSE) for other devices."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """On the CPU, whatever else there is."""
        return {"": "cpu"} if device_map == "auto" else device_map

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Hollow packed layers, in which transformers puts the bytes."""
        modules = dict(model.named_modules())
        for entry, length in _stored_layers(kwargs.get("checkpoint_files") or ()):
            found = [name for name in _variants(entry.module, model.base_model_prefix) if name in modules]
            if not found:
                continue  # a part that this class of model has not: transformers tells of its tensors
            _hollow(found[0], modules[found[0]], entry, length)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Layers that run, out of the bytes that were loaded."""
        for name, module in model.named_modules():
            entry = module.__dict__.pop("_packed_entry", None)
            if entry is None:
                continue
            if module.packed_weight.is_meta:
                raise ValueError(f"{name!r} is a packed layer, and the files have no bytes for it: they are damaged")
            try:
                module.fill(Form(entry.form), entry.block)
            except ValueError as error:
                raise ValueError(f"{name}{PACKED_WEIGHT}: {error}") from error

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Of a model with packed layers; Linear layers that are sparse and dense in memory are packed for the file."""
        state, layers = packed_state(model)
        return state, Said(layers=layers).metadata()

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights are frozen."""
        return False

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """`model.dequantize()` makes it an ordinary dense model."""
        return unpack(model)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # a reloaded module finds itself there
    register_quantization_config(METHOD)(RarefyConfig)
    register_quantizer(METHOD)(RarefyQuantizer)


# --- loading ---------------------------------------------------------------------------------------------------------


def load(shards: Shards) -> nn.Module:
    """The model of a directory, on the CPU. Raises ValueError where the files lack tensors of it."""
    kind = architecture(shards)
    model, info = kind.from_pretrained(
        shards.folder, dtype=stored_dtype(shards), local_files_only=True, output_loading_info=True
    )
    lacking = sorted(info["missing_keys"]) + sorted(str(each[0]) for each in info["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"{shards.folder} lacks {len(lacking)} tensors of {kind.__name__}, or has them in other shapes: "
            f"{', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}. They would be random: config.json is of "
            "another model."
        )
    return model


def _variants(name: str, prefix: str) -> Iterator[str]:
    """A name, and what it is called in a model with a head, or without one."""
    yield name
    if prefix:
        yield f"{prefix}.{name}"
        if name.startswith(f"{prefix}."):
            yield name.removeprefix(f"{prefix}.")


def _stored_layers(files: Iterable[str]) -> Iterator[tuple[PackedEntry, int]]:
    """Packed layers of files, with the bytes of their weights. Layers of one file may be told of by another."""
    shards = [Shard(Path(file)) for file in files if str(file).endswith(".safetensors")]
    table = {name: entry for shard in shards for name, entry in shard.table.items()}
    told: dict[str, PackedEntry] = {}
    for shard in shards:
        said = read_said(shard)
        told |= {} if said is None else said.layers
    for layer, entry in told.items():
        stored = table.get(layer + PACKED_WEIGHT)
        if stored is None:
            raise ValueError(f"{layer + PACKED_WEIGHT!r} is in none of the {len(shards)} files: they are damaged")
        yield entry, int(stored["shape"][0])


def _hollow(name: str, module: nn.Module, entry: PackedEntry, length: int) -> None:
    if type(module) is not nn.Linear:
        raise ValueError(f"{name!r} is a packed Linear in the files, a {type(module).__name__} in the model")
    seen = (module.in_features, module.out_features, module.bias is not None)
    said = (entry.in_features, entry.out_features, entry.bias_dtype is not None)
    if seen != said:
        raise ValueError(f"{name!r} has (inputs, outputs, bias) {said} in the files, {seen} in the model")
    weight, bias = entry.dtypes
    module.weight = nn.Parameter(torch.empty(module.weight.shape, dtype=weight, device="meta"))
    if bias is not None:
        module.bias = nn.Parameter(torch.empty(module.out_features, dtype=bias, device="meta"))
    PackedLinear.hollow(module, length)
    cast(Any, module)._packed_entry = entry


# --- saving ----------------------------------------------------------------------------------------------------------


def packed_state(model: Any) -> tuple[dict[str, Tensor], dict[str, PackedEntry]]:
    """A model's state for a packed file, and what is said of its packed layers, by their names in the file."""
    state: dict[str, Tensor] = dict(model.state_dict())
    shared = tied(model)
    layers: dict[str, PackedEntry] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            stored, layers[name] = file_form(name, module)
            state[name + PACKED_WEIGHT] = stored.bytes
        elif isinstance(module, Packed):  # convolutions are dense in files
            del state[name + PACKED_WEIGHT]
            state[f"{name}.weight"] = module.weight
            if state.pop(name + PACKED_BIAS, None) is not None:
                state[f"{name}.bias"] = cast(Tensor, module.bias)
        elif type(module) is nn.Linear and f"{name}.weight" not in shared:
            bias = module.bias
            kind = None if bias is None else bias.dtype
            if reason_against(module.weight.detach()) or (kind is not None and kind not in _FLOATS):
                continue
            stored, layers[name] = pack_weight(name, module.weight, kind)
            state[name + PACKED_WEIGHT] = stored.bytes
            del state[f"{name}.weight"]
            if bias is not None:
                state[name + PACKED_BIAS] = state.pop(f"{name}.bias").contiguous().view(torch.uint8)
    return state, {_in_file(model, name): entry for name, entry in layers.items()}


def _in_file(model: Any, layer: str) -> str:
    """What transformers will call a packed layer in the file."""
    (name,) = as_in_files(model, {layer + PACKED_WEIGHT: torch.empty(0)})
    return name.removesuffix(PACKED_WEIGHT)


def save_packed(model: nn.Module, out: Path) -> PackedFiles:
    """`write_packed` of a model in memory."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers, which directories are for: rarefy.save(model, path) "
            "writes any model to a file"
        )
    said: Any = getattr(model.config, "quantization_config", None)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if said is not None and not isinstance(said, RarefyConfig):
        raise ValueError(f"the model is quantised already: {said}")
    _, layers = packed_state(model)
    if not layers:
        raise ValueError(f"no layer of {type(model).__name__} gains by being packed: make it sparse first")
    before = sum(p.numel() * p.element_size() for p in unpacked_parameters(model))
    with staged(out) as files:
        try:
            model.config.quantization_config = RarefyConfig()
            cast(Any, model).hf_quantizer = RarefyQuantizer(RarefyConfig())
            model.save_pretrained(files)
        finally:
            _put_back(model, said, quantizer)
    after = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return PackedFiles(out, before, after, tuple(entry.module for entry in layers.values()), {})


def unpacked_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The parameters that a dense model would have, each once."""
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield torch.empty(module.out_features, module.in_features, dtype=module.weight_dtype, device="meta")


def _put_back(model: Any, said: Any, quantizer: Any) -> None:
    if said is None:
        del model.config.quantization_config
    else:
        model.config.quantization_config = said
    if quantizer is None:
        del model.hf_quantizer
    else:
        model.hf_quantizer = quantizer
