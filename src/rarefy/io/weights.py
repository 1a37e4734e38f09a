"""The dense tensors of a model directory, packed or not, and what a packed file says of itself.

A packed file is a safetensors file that has, in the place of `X.weight` and `X.bias`, the bytes of a stored form as
`X.packed_weight` and the bias's as `X.packed_bias`. Its metadata hold one JSON text under "rarefy": the packed layers,
a CRC-32 of each tensor and, so that unpacking gives the same bytes again, the header that the dense file had and the
dense index. What transformers saves again has the layers alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rarefy.io.container import bytes_of
from rarefy.io.shards import Shard, Shards
from rarefy.runtime.forms import Stored, from_bytes, smallest
from rarefy.runtime.packed import Packed

VERSION: Final = 1
KEY: Final = "rarefy"
CHECKSUM: Final = "rarefy_checksum"
PACKED_WEIGHT: Final = ".packed_weight"
PACKED_BIAS: Final = ".packed_bias"

DTypeName = Literal["float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PackedEntry(_Strict):
    """A packed Linear layer. module: its name in the model, which may be another than in the file. form, block: what it
    runs as, made from the stored weight when it is loaded.
    """

    module: str
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    weight_dtype: DTypeName
    bias_dtype: DTypeName | None
    form: int
    block: int

    @classmethod
    def of(cls, module: str, stored: Stored, weight: torch.dtype, bias: torch.dtype | None) -> PackedEntry:
        """Of a weight as it runs, and the dtypes of the dense tensors."""
        rows, cols = stored.shape
        return cls(
            module=module, in_features=cols, out_features=rows, weight_dtype=_name(weight),
            bias_dtype=None if bias is None else _name(bias), form=int(stored.form), block=stored.block,
        )  # fmt: skip

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype | None]:
        """Of weight and bias."""
        return getattr(torch, self.weight_dtype), None if self.bias_dtype is None else getattr(torch, self.bias_dtype)


class Said(_Strict):
    """What a packed file says of itself. layers: by their names in the file. header, index: of the dense files."""

    version: int = VERSION
    layers: dict[str, PackedEntry] = {}
    checksums: dict[str, int] = {}
    header: str | None = None
    index: str | None = None

    def metadata(self) -> dict[str, str]:
        """As the metadata of a safetensors file."""
        text = self.model_dump_json()
        return {KEY: text, CHECKSUM: f"{zlib.crc32(text.encode()):08x}"}


def read_said(shard: Shard) -> Said | None:
    """What a file says; None where it is not packed. Raises ValueError for another version and for damage."""
    text: Any = shard.metadata.get(KEY)
    if text is None:
        return None
    if not isinstance(text, str) or shard.metadata.get(CHECKSUM) != f"{zlib.crc32(text.encode()):08x}":
        raise ValueError(f"{shard.path}: what it says of its packed layers has another checksum: the file is damaged")
    try:
        said: Any = json.loads(text)
        version = said["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{shard.path}: what it says of its packed layers is damaged ({error})") from error
    if version != VERSION:
        raise ValueError(f"{shard.path} is of version {version!r}; this rarefy reads version {VERSION}. Update rarefy.")
    try:
        return Said.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{shard.path}: its metadata are damaged: {where}: {first['msg']}") from error


class Weights(Mapping[str, Tensor]):
    """Dense tensors by the names that they have in a dense directory; those of packed layers are unpacked when asked
    for. Raises ValueError for packed files that are damaged.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.said = {name: said for name, shard in shards.files.items() if (said := read_said(shard)) is not None}
        self.layers = {name: entry for said in self.said.values() for name, entry in said.layers.items()}
        self._kept_as: dict[str, tuple[str, str]] = {}
        for layer, entry in self.layers.items():
            self._kept_as[f"{layer}.weight"] = (layer, PACKED_WEIGHT)
            if entry.bias_dtype is not None:
                self._kept_as[f"{layer}.bias"] = (layer, PACKED_BIAS)
        for layer, leaf in self._kept_as.values():
            if layer + leaf not in shards:
                raise ValueError(f"{shards.folder}: there is no tensor {layer + leaf!r}: the directory is damaged")
        packed = {layer + leaf for layer, leaf in self._kept_as.values()}
        self._names = [*self._kept_as, *(name for name in shards if name not in packed)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept_as:
            return self.shards[name]
        layer, leaf = self._kept_as[name]
        entry, data = self.layers[layer], self.shards[layer + leaf]
        weight, bias = entry.dtypes
        try:
            if leaf == PACKED_WEIGHT:
                dense = from_bytes(data).dense()
                if dense.shape != (entry.out_features, entry.in_features):
                    raise ValueError(f"it is of {tuple(dense.shape)}, not of {entry}")
                return dense.to(weight)
            return data.clone().view(bias or torch.float32)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self.shards.folder}: {layer + leaf!r} is damaged: {error}") from error

    def damaged(self) -> list[str]:
        """Tensors of packed files whose bytes are not those that were written: a line each."""
        found: list[str] = []
        for file, said in self.said.items():
            shard = self.shards.files[file]
            for name, said_sum in said.checksums.items():
                if name not in shard.table:
                    found.append(f"{name}: it is not in {file} any more")
                elif zlib.crc32(bytes_of(shard.tensor(name))) != said_sum:
                    found.append(f"{name}: its bytes in {file} are not the ones that were written")
        return found


def file_form(name: str, layer: Packed) -> tuple[Stored, PackedEntry]:
    """The stored form for a file of a packed layer, and what is said of it."""
    kind = None if layer.bias is None else layer.bias.dtype
    return smallest(layer.stored), PackedEntry.of(name, layer.stored, layer.weight_dtype, kind)


def _name(dtype: torch.dtype) -> DTypeName:
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"a packed layer has weights and biases of float32, bfloat16 or float16; got {dtype}")
    return name
