"""What config.json names, and what a model and its files call the same things. Imports transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from rarefy.io.shards import Shards
from rarefy.io.weights import PACKED_BIAS, PACKED_WEIGHT


def architecture(shards: Shards) -> Any:
    """The class that config.json names. Raises ValueError for none, and for one that transformers has not."""
    names = shards.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(
            f"config.json of {shards.folder} has architectures={names!r}, which is no class of transformers "
            f"{transformers.__version__}: name one, such as 'LlamaForCausalLM'. Code in a directory is never run."
        )
    return found


def linear_layers(shards: Shards) -> tuple[dict[str, str], dict[str, str]]:
    """The nn.Linear layers of a directory that could be packed, by their names in its files, with their names in the
    model; and for other matrices why they cannot be."""
    kind = architecture(shards)
    config = transformers.AutoConfig.from_pretrained(shards.folder, local_files_only=True)
    with torch.device("meta"):
        model = kind(config)
    modules = dict(model.named_modules())
    shared, called = tied(model), Names(model)
    layers: dict[str, str] = {}
    others: dict[str, str] = {}
    for name in sorted(shards):
        shape = shards.kind(name)[1]
        if len(shape) < 2:
            continue
        layer, _, leaf = name.rpartition(".")
        found = called(name)
        there = "" if found is None else found.rpartition(".")[0]
        if found is None:
            others[layer] = "the model has no layer of its own for it: its tensors are fused when they are loaded"
        elif type(modules[there]) is not nn.Linear or leaf != "weight":
            others[layer] = f"there is no packed layer for {type(modules[there]).__name__}"
        elif f"{there}.weight" in shared:
            others[layer] = "its weight is tied to another layer's"
        elif tuple(modules[there].weight.shape) == shape and called.packed(layer, there):
            layers[layer] = there
    return layers, others


class Names:
    """What transformers will call a file's tensors when it loads them: its own renaming, asked."""

    def __init__(self, model: Any) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state: dict[str, Tensor] = dict(model.state_dict())

    def __call__(self, name: str) -> str | None:
        """A parameter's name; None for a tensor that becomes a part of another, or that the model has not."""
        found, fused = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if fused is None and found in self._state:
            return found
        return name if name in self._state else None

    def packed(self, layer: str, module: str) -> bool:
        """Whether the packed tensors of a layer will find their way, too."""
        meta = torch.empty(0, device="meta")
        wanted = {layer + leaf: module + leaf for leaf in (PACKED_WEIGHT, PACKED_BIAS)}
        state = self._state | dict.fromkeys(wanted.values(), meta)
        return all(
            rename_source_key(name, self._renamings, self._converters, self._prefix, state) == (there, None)
            for name, there in wanted.items()
        )


def tied(model: Any) -> set[str]:
    """Names of parameters that are one with others."""
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    return {*keys.keys(), *keys.values(), *shared}


def as_in_files(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of parameters → by those that transformers would save them under, fused ones in parts."""
    with torch.no_grad():
        return {name: each.contiguous() for name, each in revert_weight_conversion(model, dict(tensors)).items()}
