"""What is remembered of a pruning: `rarefy.json`, from which the tensors of a directory can be proved.

A mask does not follow from values, since a kept weight may be zero. Per site the record therefore holds, beside counts
and a digest of the mask, which of the *zeros* are kept (one bit for each zero, compressed; absent where none is): the
mask is the weights that are not zero and those zeros.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from rarefy.axes import Layout, Pattern
from rarefy.axes.value import from_dict
from rarefy.core import bits

RECORD: Final = "rarefy.json"
VERSION: Final = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SiteRecord(_Strict):
    """One pruned tensor. mask: SHA-256 of its mask, one bit a weight, lowest bit first, in the tensor's row order.

    layout: how the tensor is stored, as fields of `Layout` that are not usual. kept_zeros: which zeros are kept.
    """

    name: str
    shape: list[int]
    pattern: dict[str, JsonValue]
    kept: int = Field(ge=0)
    total: int = Field(ge=1)
    sparsity: float
    mask: str
    layout: dict[str, int] = {}
    kept_zeros: str | None = None

    @classmethod
    def of(cls, name: str, weight: Tensor, mask: Tensor, pattern: Pattern, layout: Layout | None = None) -> SiteRecord:
        """The record of a weight and its mask, both in the stored shape.

        Raises ValueError where shapes differ or a weight that the mask leaves out is not +0.0.
        """
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"{name!r}: a mask of {tuple(mask.shape)} {mask.dtype} is none for a weight of {tuple(weight.shape)}"
            )
        mask, weight = mask.detach().cpu(), weight.detach().cpu()
        wrong = bits.count(bits.as_bits(weight).ne(0).logical_and_(~mask))
        if wrong:
            raise ValueError(
                f"{name!r}: {wrong} of {mask.numel() - int(mask.sum())} weights that the mask leaves out are not +0.0; "
                "clear them first: weight.masked_fill_(~mask, 0)"
            )
        kept, zeros = bits.count(mask), weight.eq(0)
        some = bool(zeros.logical_and(mask).any())  # else no list of all zeros, which takes eight times their memory
        return cls(
            name=name, shape=list(weight.shape), pattern=pattern.to_dict(), kept=kept, total=mask.numel(),
            sparsity=1 - kept / mask.numel(), mask=digest(mask), layout=_unusual(layout),
            kept_zeros=_pressed(bits.pack(mask[zeros])) if some else None,
        )  # fmt: skip

    def mask_of(self, weight: Tensor) -> Tensor:
        """The mask of a weight: what is not zero, and the zeros that are kept, as far as they can be told."""
        mask = weight.ne(0)
        if self.kept_zeros is None:
            return mask
        zeros = ~mask
        count = bits.count(zeros)
        packed = torch.frombuffer(bytearray(_released(self.kept_zeros)), dtype=torch.uint8)
        if packed.numel() == (count + 7) // 8:
            mask[zeros] = bits.unpack(packed, (count,))
        return mask

    def read_pattern(self) -> Pattern:
        """Raises ValueError for a pattern that is not known."""
        found = from_dict(self.pattern)
        if not isinstance(found, Pattern):
            raise ValueError(f"{self.name!r}: {self.pattern} is no pattern: the record is damaged")
        return found

    def read_layout(self) -> Layout:
        """Raises ValueError for fields that `Layout` has not."""
        try:
            return Layout(**cast(Any, {**self.layout, "transposed": bool(self.layout.get("transposed"))}))
        except TypeError as error:
            raise ValueError(f"{self.name!r}: {self.layout} is no layout: the record is damaged ({error})") from error


class CalibrationRecord(_Strict):
    """The text that a method saw. sha256: of the windows. settings: how they were chosen."""

    sha256: str
    settings: dict[str, JsonValue] = {}


class Record(_Strict):
    """What was done, to which tensors, and with what. `mask`: SHA-256 over the sites' digests, in their order."""

    version: int = VERSION
    method: dict[str, JsonValue]
    pattern: str
    kept: int
    total: int
    sparsity: float
    mask: str
    calibration: CalibrationRecord | None = None
    settings: dict[str, JsonValue] = {}
    versions: dict[str, str]
    created: str
    sites: list[SiteRecord]

    @classmethod
    def of(
        cls,
        method: Mapping[str, Any],
        sites: Iterable[SiteRecord],
        *,
        calibration: CalibrationRecord | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Record:
        """A record made now. method: its `to_dict()`. settings: whatever else a reader should know, as JSON."""
        listed = list(sites)
        if not listed:
            raise ValueError("a record needs at least one site")
        kept, total = sum(site.kept for site in listed), sum(site.total for site in listed)
        return cls(
            method=dict(method), pattern=", ".join(dict.fromkeys(str(site.read_pattern()) for site in listed)),
            kept=kept, total=total, sparsity=1 - kept / total, mask=_digest_of(listed), calibration=calibration,
            settings=dict(settings or {}), versions=versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"), sites=listed,
        )  # fmt: skip

    def problems(self) -> list[str]:
        """Where it contradicts itself."""
        found: list[str] = []
        for name, said in (("kept", self.kept), ("total", self.total)):
            seen = sum(getattr(site, name) for site in self.sites)
            if seen != said:
                found.append(f"{RECORD}: {name} is {said}, its sites have {seen}")
        if self.mask != _digest_of(self.sites):
            found.append(f"{RECORD}: the digest of all masks is not that of its sites")
        return found

    def write(self, folder: Path) -> None:
        """Write it as `rarefy.json`."""
        text = self.model_dump_json(indent=2, exclude_defaults=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> Record:
    """The record of a directory. Raises ValueError where there is none, and for damage and other versions."""
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder} has no {RECORD}: it was not pruned by rarefy, and there is nothing to prove")
    try:
        said: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: it is damaged ({error})") from error
    version = said.get("version") if isinstance(said, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} is of version {version!r}; this rarefy reads version {VERSION}. Update rarefy.")
    try:
        return Record.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}: {first['msg']}: the file is damaged") from error


def digest(mask: Tensor) -> str:
    """SHA-256 of a mask, one bit a weight."""
    return hashlib.sha256(bits.pack(mask.contiguous()).numpy().tobytes()).hexdigest()


def versions() -> dict[str, str]:
    """Of rarefy, torch and, where it is installed, transformers."""
    found = {"rarefy": str(getattr(sys.modules["rarefy"], "__version__", "?")), "torch": str(torch.__version__)}
    with suppress(metadata.PackageNotFoundError):
        found["transformers"] = metadata.version("transformers")
    return found


def _digest_of(sites: Iterable[SiteRecord]) -> str:
    return hashlib.sha256("".join(f"{site.name}\n{site.mask}\n" for site in sites).encode()).hexdigest()


def _unusual(layout: Layout | None) -> dict[str, int]:
    usual = vars(Layout())
    return {} if layout is None else {key: int(x) for key, x in vars(layout).items() if x != usual[key]}


def _pressed(packed: Tensor) -> str:
    return base64.b64encode(zlib.compress(packed.numpy().tobytes(), 6)).decode()


def _released(text: str) -> bytes:
    try:
        return zlib.decompress(base64.b64decode(text, validate=True))
    except (ValueError, zlib.error) as error:
        raise ValueError(f"the kept zeros of a site cannot be read: {RECORD} is damaged ({error})") from error
