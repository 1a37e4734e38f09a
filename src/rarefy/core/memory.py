"""Memory that was freed, given back to the system."""

import contextlib
import ctypes
import gc

__all__ = ["give_back"]


def give_back(*, collect: bool = True) -> None:
    """Let go of what is free inside of the process's heap, which long runs of large and small tensors leave in pieces.

    collect: look for cycles of objects first. By glibc; elsewhere nothing but that is done.
    """
    if collect:
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
