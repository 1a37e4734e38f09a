"""Text from files: plain text, JSON lines, parquet. Documents are joined by blank lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["read_text"]

_BETWEEN = "\n\n"
_JSON_LINES = (".jsonl", ".ndjson")


def read_text(path: Path, *, field: str | None = None, limit: int | None = None) -> str:
    """The text of a file, as UTF-8.

    path: `.jsonl` and `.ndjson` hold one JSON object a line, `.parquet` a column of documents; any other file is text.
    field: of the objects, or the column (default "text"). limit: characters after which no more is read.
    Raises ValueError for a file that is no such thing, naming the line, OSError where it cannot be read.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give one file of text, JSON lines or parquet")
    if suffix in _JSON_LINES:
        return _joined(_json_lines(path, field or "text"), limit)
    if suffix == ".parquet":
        return _joined(_parquet(path, field or "text"), limit)
    if field is not None:
        raise ValueError(
            f"{path} is read as plain text, which has no field {field!r}: fields are of .jsonl and .parquet"
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(-1 if limit is None else limit)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}") from None


def _joined(documents: Iterable[str], limit: int | None) -> str:
    found: list[str] = []
    length = 0
    for document in documents:
        found.append(document)
        length += len(document) + len(_BETWEEN)
        if limit is not None and length > limit:
            break
    return _BETWEEN.join(found)[:limit]


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                document: Any = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
            text = document.get(field) if isinstance(document, dict) else None
            if not isinstance(text, str):
                seen = f"the fields {', '.join(document) or 'none'}" if isinstance(document, dict) else "no object"
                raise ValueError(f"{path}, line {number}: no text under {field!r}, but {seen}; name one with --field")
            yield text


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: parquet files are read with pyarrow, which is not installed: pip install pyarrow, or give the "
            "text as .jsonl or .txt",
            name="pyarrow",
        ) from error
    with path.open("rb") as opened:  # an OSError of our own where there is no file
        file: Any = parquet.ParquetFile(opened)
        names = list(file.schema_arrow.names)
        if field not in names:
            raise ValueError(f"{path} has no column {field!r}, but {', '.join(names)}; name one with --field")
        for batch in file.iter_batches(columns=[field], batch_size=1024):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise ValueError(f"{path}: the column {field!r} holds {type(text).__name__}, not text")
                if text:
                    yield text
