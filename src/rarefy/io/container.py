"""The container: a safetensors file in which every tensor begins at a multiple of 64 bytes and has a checksum.

safetensors: 8 bytes, the length n of the header; n bytes of JSON, names with dtype, shape and offsets; the tensors'
bytes, without holes. Here the JSON is filled up with spaces and the tensors with others named `__pad__.0`, ... of
uint8, so that a map of the file is a map of every tensor. Its metadata are one JSON text under "rarefy", versioned, and
a CRC-32 of that text and the table of tensors; the text holds a CRC-32 of each tensor. Any safetensors reader reads it.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import torch
from torch import Tensor

ALIGNMENT: Final = 64
PAD: Final = "__pad__."
MAX_HEADER: Final = 100_000_000  # bytes, as other readers of the format allow
KEY: Final = "rarefy"
CHECKSUM: Final = "checksum"

DTYPES: Final = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

Table = dict[str, dict[str, Any]]


def write(path: Path, tensors: Mapping[str, Tensor], contents: Mapping[str, Any]) -> None:
    """Write tensors and what is said of them, all or nothing: a failure leaves no file, and an older one as it was.

    tensors: on any device, of a dtype in DTYPES. contents: a JSON object; the tensors' checksums are added to it.
    """
    for name in tensors:
        if name.startswith("__"):
            raise ValueError(f"names that begin with two underscores belong to the file; got {name!r}")
    blocks = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    table = _table(tensors)
    sums = {name: zlib.crc32(block) for name, block in blocks.items()}
    text = json.dumps({**contents, "checksums": sums}, separators=(",", ":"))
    metadata = {KEY: text, CHECKSUM: _checksum(text, table)}
    header = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    if len(header) > MAX_HEADER:
        raise ValueError(
            f"the header of {len(tensors)} tensors takes {len(header)} bytes; the format ends at {MAX_HEADER}"
        )
    with _atomically(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, entry in table.items():
            first, last = entry["data_offsets"]
            file.write(blocks[name] if name in blocks else bytes(last - first))


class Reader:
    """A file of `write`, mapped: nothing in it is believed before it is checked.

    path: the file. verify: compare each tensor's checksum when it is asked for, which reads it whole (about 0.3 s per
    GB); the header's own is always compared. Raises ValueError for anything that `write` does not write, OSError where
    the file cannot be opened.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path, self.verify = path, verify
        self._map, self._first, self.table, metadata = mapped(path)
        try:
            self.contents = _contents(self.table, metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def names(self) -> list[str]:
        """The tensors that were given to `write`."""
        return [name for name in self.table if not name.startswith(PAD)]

    def tensor(self, name: str) -> Tensor:
        """A tensor on the file's map, with a storage of its own: nothing is copied, and what is written to it never
        reaches the file.
        """
        entry = self.table.get(name)
        if entry is None:
            raise ValueError(f"{self.path}: there is no tensor {name!r} in it: the file is damaged")
        first, last = (self._first + offset for offset in entry["data_offsets"])
        if first % ALIGNMENT:
            raise ValueError(f"{self.path}: {name!r} begins at byte {first}, no multiple of {ALIGNMENT}: it is damaged")
        data = memoryview(self._map)[first:last]
        if self.verify and zlib.crc32(data) != self.contents["checksums"].get(name):
            raise ValueError(
                f"{self.path}: the bytes of {name!r} are not the ones that were saved: the file is damaged"
            )
        dtype = DTYPES[entry["dtype"]]
        if first == last:
            return torch.empty(entry["shape"], dtype=dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=last - first, offset=first)
        if dtype == torch.bool and int(raw.max()) > 1:
            raise ValueError(f"{self.path}: {name!r} has booleans that are neither 0 nor 1: the file is damaged")
        return raw.view(dtype).view(entry["shape"])


def mapped(path: Path) -> tuple[mmap.mmap, int, Table, dict[str, Any]]:
    """Any safetensors file: its bytes, mapped, where its tensors begin, the table of them in the order of their bytes,
    and its metadata. Raises ValueError, naming the file, where it is cut short, damaged or something else.
    """
    data = _map(path)
    try:
        header, first = _header(data)
        return data, first, *_parse(header, len(data) - first)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_storable(tensor: Tensor) -> str | None:
    """None if a tensor can be written, else the reason why not."""
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.device.type == "meta":
        return "it is on the meta device and has no values"
    if tensor.dtype not in NAMES:
        return f"its dtype is {tensor.dtype}, which safetensors does not have"
    return None


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row order, on its own memory where it is contiguous and on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return memoryview(cast(Any, plain.reshape(-1).view(torch.uint8).numpy())) if plain.numel() else memoryview(b"")


def _table(tensors: Mapping[str, Tensor]) -> Table:
    """Names in the order of their bytes, each tensor at a multiple of 64, the gaps filled by tensors of their own."""
    table: Table = {}
    end = pads = 0
    for name, tensor in tensors.items():
        first = -(-end // ALIGNMENT) * ALIGNMENT
        if first != end:
            table[f"{PAD}{pads}"] = {"dtype": "U8", "shape": [first - end], "data_offsets": [end, first]}
            pads += 1
        end = first + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    return table


def _checksum(text: str, table: Table) -> str:
    return f"{zlib.crc32((text + json.dumps(table, separators=(',', ':'), sort_keys=True)).encode()):08x}"


@contextmanager
def _atomically(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when all was written and is on the disk."""
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    with suppress(OSError):  # the new name on the disk too, where a folder can be synced
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _map(path: Path) -> mmap.mmap:
    """The file's bytes, mapped privately: pages are read when they are used, and copied when they are written to."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"{path}: a safetensors file has at least 8 bytes; this one has {size}: it is cut short")
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)


def _header(data: mmap.mmap) -> tuple[bytes, int]:
    """The JSON, and where the tensors begin."""
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_HEADER):
        raise ValueError(
            f"its header claims {length} bytes, in a file of {len(data)} and of at most {MAX_HEADER}: "
            "it is no safetensors file, or cut short"
        )
    return data[8 : 8 + length], 8 + length


def _parse(header: bytes, size: int) -> tuple[Table, dict[str, Any]]:
    """The table of tensors, in the order of their bytes, and the metadata."""
    try:
        loaded: Any = json.loads(header.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: it is no safetensors file, or damaged ({error})") from error
    if not isinstance(loaded, dict):
        raise ValueError("its header is no JSON object: it is no safetensors file, or damaged")
    table = cast("dict[str, Any]", loaded)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are no JSON object: the file is damaged")
    for name, entry in table.items():
        _check_entry(name, entry)
    end = 0
    ordered = dict(sorted(table.items(), key=lambda item: item[1]["data_offsets"]))
    for name, entry in ordered.items():
        if entry["data_offsets"][0] != end:
            raise ValueError(f"{name!r} begins at {entry['data_offsets'][0]}, not at {end}, where the one before ends")
        end = entry["data_offsets"][1]
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, the file has {size} for them: it is cut short or damaged")
    return ordered, cast("dict[str, Any]", metadata)


def _check_entry(name: str, entry: Any) -> None:
    """Raises ValueError where an entry of the table is not that of a tensor whose bytes can exist."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name!r} has no dtype, shape and pair of offsets: the header is damaged") from error
    named = type(dtype) is str and dtype in DTYPES
    if not named or not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"{name!r} has dtype {dtype!r} and shape and offsets {numbers}: the header is damaged")
    if prod(max(side, 1) for side in shape) >= 2**62 or last - first != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name!r} of {dtype} {shape} does not take {last - first} bytes: the header is damaged")


def _contents(table: Table, metadata: dict[str, Any]) -> dict[str, Any]:
    text, checksum = metadata.get(KEY), metadata.get(CHECKSUM)
    if not isinstance(text, str) or not isinstance(checksum, str):
        raise ValueError(
            "it is a safetensors file without rarefy's header. rarefy.load reads what rarefy.save wrote; "
            "safetensors.torch.load_file reads others."
        )
    if _checksum(text, table) != checksum:
        raise ValueError("the checksum of its header is another one: the file is damaged")
    try:
        contents: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"what it says of itself is no JSON: the file is damaged ({error})") from error
    if not isinstance(contents, dict) or not isinstance(cast("dict[str, Any]", contents).get("checksums"), dict):
        raise ValueError("what it says of itself lacks the checksums: the file is damaged")
    return cast("dict[str, Any]", contents)
