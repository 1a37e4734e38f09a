"""The weights of a model directory: safetensors files, one or several with an index, mapped and read one by one."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from rarefy.io.container import ALIGNMENT, DTYPES, NAMES, Table, bytes_of, mapped

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"

_MOST: Final = 10**11  # of digits that a side can have
_LOOKED: Final = 1 << 18  # entries at a time: what is made of them stays in the caches
_WRITTEN: Final = 1 << 26  # bytes at a time


class Shard:
    """One safetensors file, mapped. `table`: dtype, shape and offsets by name, in the order of the bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map, self._first, self.table, self.metadata = mapped(path)

    @property
    def header(self) -> bytes:
        """All that stands before the tensors, as it is in the file."""
        return self._map[: self._first]

    def tensor(self, name: str) -> Tensor:
        """A tensor on the file's map: nothing is read before it is used, and nothing written to it reaches the file."""
        entry = self.table[name]
        first, last = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        if first == last:
            return torch.empty(entry["shape"], dtype=dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=last - first, offset=self._first + first)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry["shape"])


class Shards:
    """All weights of a model directory, found as transformers finds them.

    Raises FileNotFoundError or NotADirectoryError where there is no directory; ValueError where it is not one of a
    model (config.json and safetensors), where a shard that the index names is not there, and where one is cut short.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Shards(Path(folder))
    Traceback (most recent call last):
    ValueError: ... is not a model directory: it has no config.json. ...
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _refuse_other(folder)
        self.config: dict[str, Any] = _json(folder / CONFIG)
        self.index: bytes | None = None
        if (folder / WEIGHTS).is_file():
            names = [WEIGHTS]
        else:
            self.index = (folder / INDEX).read_bytes()
            names = _shards_of(folder)
        self.files = {name: Shard(folder / name) for name in names}
        self._where = {name: shard for shard in self.files.values() for name in shard.table}
        if self.index is not None:
            self._check_index()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor on its file's map. Raises KeyError for a name that is in none."""
        return self._where[name].tensor(name)

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape, without reading the tensor."""
        entry = self._where[name].table[name]
        return DTYPES[entry["dtype"]], tuple(entry["shape"])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e["data_offsets"][1] - e["data_offsets"][0] for s in self.files.values() for e in s.table.values())

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating dtype that most entries have; None where there is none."""
        entries: dict[torch.dtype, int] = {}
        for name in self:
            dtype, shape = self.kind(name)
            if dtype.is_floating_point:
                entries[dtype] = entries.get(dtype, 0) + torch.Size(shape).numel()
        return max(entries, key=lambda dtype: entries[dtype], default=None)

    def _check_index(self) -> None:
        for name, shard in _weight_map(self.folder).items():
            if name not in self.files[shard].table:
                raise ValueError(
                    f"{self.folder / INDEX} says that {name!r} is in {shard}, which has no such tensor: the directory "
                    "is damaged, or files of two models are mixed. Copy it anew."
                )


def _refuse_other(folder: Path) -> None:
    """Raises where a folder is not a model directory."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such directory")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the directory that has {CONFIG} and {WEIGHTS}")
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is not a model directory: it has no {CONFIG}. One is made by model.save_pretrained(folder)."
        )
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        seen = f"; it has {', '.join(others[:4])}" if others else ""
        raise ValueError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}{seen}. Load it with transformers and save it anew "
            "(model.save_pretrained(folder)), which writes safetensors."
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: it is damaged ({error})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds {type(loaded).__name__}, not a JSON object: it is damaged")
    return loaded


def _weight_map(folder: Path) -> dict[str, str]:
    found = _json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{folder / INDEX} has no 'weight_map' from tensors to files: it is damaged")
    return found


def _shards_of(folder: Path) -> list[str]:
    """The files that the index names, in its order. Raises ValueError for any that is not there."""
    names = sorted(dict.fromkeys(_weight_map(folder).values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} names {name!r}, which is not a file in that directory")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder / INDEX} names {len(names)} files; missing: {', '.join(missing[:4])}"
            f"{', …' if len(missing) > 4 else ''}. Download or copy the directory anew."
        )
    return names


# --- values ----------------------------------------------------------------------------------------------------------


def refuse_infinite(name: str, tensor: Tensor, where: object = "") -> None:
    """Raises ValueError, with counts, where a floating tensor has NaN or infinite entries."""
    if not tensor.dtype.is_floating_point:
        return
    nan = infinite = 0
    for part in tensor.detach().reshape(-1).split(_LOOKED):
        part = part.float() if part.element_size() == 1 else part
        if not bool(part.isfinite().all()):
            nan += int(part.isnan().sum())
            infinite += int(part.isinf().sum())
    if nan or infinite:
        place = f" of {where}" if where else ""
        raise ValueError(
            f"{name!r}{place} has {nan} NaN and {infinite} infinite entries of {tensor.numel()}: such a model is "
            "broken before it is pruned. Load another copy of it."
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_like(shard: Shard, path: Path, tensor: Callable[[str], Tensor]) -> int:
    """Write a file with the header of `shard` and these tensors, one at a time; returns its bytes.

    tensor: by name, of the dtype and shape that the header says. Metadata stay as they are, with "format": "pt".
    """
    header = shard.header
    if shard.metadata.get("format") != "pt":
        header = header_of(shard.table, {**shard.metadata, "format": "pt"})
    return write_raw(path, header, (tensor(name) for name in shard.table))


def write_raw(path: Path, header: bytes, tensors: Iterable[Tensor]) -> int:
    """Write a header and the tensors in the order of its offsets; returns the bytes of the file."""
    with open(path, "xb") as file:
        _put(file, memoryview(header))
        for each in tensors:
            _put(file, bytes_of(each))
        _sync(file)
        return file.tell()


def header_of(table: Table, metadata: dict[str, str], room: int = 0) -> bytes:
    """Length and JSON, filled up with spaces to `room` bytes or to a multiple of 8."""
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (room - 8 - len(text) if room else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Stream:
    """A new safetensors file whose tensors are given one after the other; the header is written last.

    sides: all that will be given, with the number of their sides; draft: metadata as long as those that will be given,
    or longer. Together they tell how much room the header needs. A context manager: it closes the file, whole or not.
    """

    def __init__(self, path: Path, sides: Mapping[str, int], draft: dict[str, str]) -> None:
        table = {
            name: {"dtype": "F8_E4M3", "shape": [_MOST] * number, "data_offsets": [_MOST * 1000] * 2}
            for name, number in sides.items()
        }
        self._room = -(-len(header_of(table, {"format": "pt", **draft})) // ALIGNMENT) * ALIGNMENT
        self.table: Table = {}
        self.sums: dict[str, int] = {}
        self._file = open(path, "xb")  # noqa: SIM115  closed by __exit__
        self._file.seek(self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor; the first begins at a multiple of 64 bytes, the others where the one before ends."""
        data = bytes_of(tensor)
        first = self._file.tell() - self._room
        _put(self._file, data)
        self.sums[name] = zlib.crc32(data)
        self.table[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, first + len(data)],
        }  # fmt: skip

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def finish(self, metadata: dict[str, str]) -> int:
        """Write the header; returns the bytes of the file."""
        header = header_of(self.table, {"format": "pt", **metadata}, self._room)
        if len(header) != self._room:
            raise ValueError(f"the header takes {len(header)} bytes, {self._room} were left for it")
        size = self._file.tell()
        self._file.seek(0)
        _put(self._file, memoryview(header))
        _sync(self._file)
        return size


def _put(file: BinaryIO, data: memoryview) -> None:
    for first in range(0, len(data), _WRITTEN):
        file.write(data[first : first + _WRITTEN])


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
