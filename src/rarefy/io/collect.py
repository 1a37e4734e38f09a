"""From a sparsified model to what `write_model` takes: changed tensors by the names of the files, and the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.axes import Layout
from rarefy.core import Site, Sparsity
from rarefy.core.memory import give_back
from rarefy.io.directory import loader
from rarefy.io.record import CalibrationRecord, Record, SiteRecord
from rarefy.io.shards import Shards


def collect(
    model: nn.Module,
    sparsity: Sparsity,
    source: Path | str,
    *,
    calibration: CalibrationRecord | None = None,
    settings: Mapping[str, Any] | None = None,
    spill: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, Tensor], Record]:
    """The pruned tensors of a model under the names, in the shapes and dtypes that they have in its directory.

    model: as `read_model` gave it. Experts that transformers fuses on loading are taken apart again, each with its own
    entry in the record. Weights are cast back where the model was loaded in another dtype. spill: what takes copies out
    of memory, until they are written. Raises ValueError for sites that the files do not have.
    """
    shards = Shards(Path(source))
    changes: dict[str, Tensor] = {}
    sites: list[SiteRecord] = []
    for site in sparsity.sites:
        weights = stored_as(model, {site.name: site.parameter.detach()}, shards)
        masks = stored_as(model, {site.name: site.mask}, shards)
        for name, weight in weights.items():
            dtype, _ = shards.kind(name)
            changes[name] = _cast(weight, dtype, site.parameter, spill)
            layout = site.layout if weight.shape == site.parameter.shape else _layout(site, masks[name])
            sites.append(SiteRecord.of(name, changes[name], masks[name], site.pattern, layout))
        if spill is not None:
            give_back(collect=False)
    record = Record.of(sparsity.method.to_dict(), sites, calibration=calibration, settings=settings)
    return changes, record


def _cast(weight: Tensor, dtype: torch.dtype, parameter: Tensor, spill: Callable[[Tensor], Tensor] | None) -> Tensor:
    """In the dtype of the files; out of memory where that is a copy."""
    found = weight.to(dtype)
    is_copy = found.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
    return spill(found) if spill is not None and is_copy else found


def stored_as(model: nn.Module, tensors: Mapping[str, Tensor], shards: Shards) -> dict[str, Tensor]:
    """Tensors by the names of a model's parameters → by the names in its files: renamed, or taken apart.

    Raises ValueError for those that the files do not have, in that shape or in parts of it.
    """
    plain = {name: each for name, each in tensors.items() if name in shards}
    rest = {name: each for name, each in tensors.items() if name not in shards}
    if not rest:
        return plain
    found = loader().as_in_files(model, rest)
    unknown = sorted(name for name in found if name not in shards)
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(rest)[:3])} of {type(model).__name__} would be {', '.join(unknown[:3])} in "
            f"{shards.folder}, which has no such tensor. Is it the directory that the model was read from?"
        )
    return plain | found


def _layout(site: Site, mask: Tensor) -> Layout:
    """How a part of a fused tensor is stored: outputs first, unless its shape or its pattern says otherwise."""
    inputs = site.shape[1] if len(site.shape) > 1 else 0
    if mask.ndim == 2 and mask.shape[1] != inputs and mask.shape[0] == inputs:
        return Layout(transposed=True)
    square = mask.ndim == 2 and mask.shape[0] == mask.shape[1]
    if square and not site.pattern.elementwise and not site.pattern.legal(mask):
        return Layout(transposed=site.pattern.legal(mask.t().contiguous()))
    return Layout()
