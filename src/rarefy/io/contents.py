"""What a file says of itself beside its tensors: which layers are packed and how, and which tensors are tied."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue

VERSION: Final = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PackedEntry(_Strict):
    """One packed layer. names: where it is in the model. tensor: its stored weight; bias: its bias, if any.

    form, block: what it ran as, which is made from the stored weight when the file is loaded. description: what the
    layer says of itself, its kind and sizes.
    """

    names: list[str] = Field(min_length=1)
    tensor: str
    bias: str | None
    form: int
    block: int
    description: dict[str, JsonValue]


class Contents(_Strict):
    """packed: the packed layers. tied: further names of a tensor -> the name that it is stored under."""

    version: int
    packed: list[PackedEntry]
    tied: dict[str, str]
    checksums: dict[str, int]


def read(contents: dict[str, Any]) -> Contents:
    """Contents out of JSON. Raises ValueError for another version and for anything that is not as above."""
    version = contents.get("version")
    if version != VERSION:
        raise ValueError(f"it is of version {version!r}; this rarefy reads version {VERSION}. Update rarefy.")
    return Contents.model_validate(contents)
