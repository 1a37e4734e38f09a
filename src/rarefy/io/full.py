"""A full disk: how it is told from other errors, and what is said then."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rarefy.io.folder import JOURNAL, partial_of

__all__ = ["is_full", "said_when_full"]

_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SAID: Final = ("No space left on device", "Disk quota exceeded", "File too large")


def is_full(error: BaseException | None) -> bool:
    """Whether no more could be written: the error, or what it was raised from, says so.

    >>> is_full(OSError(errno.ENOSPC, "No space left on device")), is_full(OSError(errno.EACCES, "Permission denied"))
    (True, False)
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in _SAID):  # safetensors and torch have errors of their own
            return True
        error = error.__cause__
    return False


@contextmanager
def said_when_full(out: Path) -> Iterator[None]:
    """What was being written when the disk was full, what is left, and what to do; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        journal = partial_of(out) / JOURNAL
        kept = sorted(journal.glob("*.safetensors")) if journal.is_dir() else []
        text = f"the disk is full ({_reason(error)}): {out} was not written. Free some space and run the same again"
        if kept:
            size = sum(path.stat().st_size for path in kept) / 1e6
            text += (
                f"; it continues after the {len(kept)} finished blocks in {journal} ({size:.1f} MB, which are yours to "
                "delete if it is not to go on)"
            )
        told = OSError(f"{text}.")
        told.errno = errno.ENOSPC
        raise told from error


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
