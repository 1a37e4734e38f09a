"""The compiled kernels (`kernels/`): finding, loading and calling them; without them torch does the same, slower.

The library lies in the package where it was installed with a C++ compiler at hand. It is looked for when a kernel is
first wanted. Three environment variables, read at that time:

- RAREFY_NATIVE=0 leaves it alone;
- RAREFY_LIBRARY=/path/to/librarefy.so takes that one (a build with sanitizers, say);
- RAREFY_ISA=baseline, v3 or v4 picks the instruction set (x86-64-v3: AVX2, x86-64-v4: AVX-512), by default the best
  that the processor has.

>>> bool(status().isa) != bool(status().reason)  # in use, or there is a reason why not
True
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

ABI_VERSION = 3  # of kernels/rarefy.h
_NAME = "librarefy.so"
_PLAIN = frozenset({Tensor, torch.nn.Parameter})  # a subclass may have its memory elsewhere, or none
_LOG = logging.getLogger("rarefy")

_Clear = Callable[[int, int, int, int], int]


@dataclass(frozen=True)
class Status:
    """Whether the compiled kernels are in use: the instruction set they run on, or the reason why they are not."""

    path: Path | None = None
    isa: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return f"compiled kernels: {self.isa}, {self.path}" if self.isa else f"no compiled kernels: {self.reason}"


def status() -> Status:
    """What `clear_` runs on, in this process."""
    return _load()[0]


def library() -> ctypes.CDLL | None:
    """The whole library, for those who declare the functions that they call; None where it is not in use."""
    return _load()[1]


def clear_(tensor: Tensor, keep: Tensor) -> bool:
    """`bits.clear_` by the compiled kernel, where it can: both on the CPU, of one shape, dense, in one memory order.

    Returns whether it was done; if not, nothing was touched. Autograd sees a write in place, as after any torch op.
    """
    if not (
        type(tensor) in _PLAIN
        and type(keep) in _PLAIN
        and tensor.is_cpu
        and keep.is_cpu
        and keep.dtype is torch.int8
        and not tensor.is_complex()  # conjugation may be pending
        and tensor.shape == keep.shape
        and _same_walk(tensor, keep)
    ):
        return False
    kernel = _load()[2]
    if kernel is None or kernel(tensor.data_ptr(), keep.data_ptr(), tensor.numel(), tensor.element_size()):
        return False
    torch.autograd.graph.increment_version(tensor)
    return True


def _same_walk(a: Tensor, b: Tensor) -> bool:
    """Whether entry after entry in memory, without gaps, is the same entry in both."""
    if a.is_contiguous():
        return b.is_contiguous()
    if a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last):  # convolutions; the rest takes 2 µs more
        return b.is_contiguous(memory_format=torch.channels_last)
    return a.stride() == b.stride() and _dense(a)


def _dense(t: Tensor) -> bool:
    size = 1
    for stride, length in sorted(zip(t.stride(), t.shape, strict=True)):
        if length != 1:
            if stride != size:
                return False
            size *= length
    return True


@cache
def _load() -> tuple[Status, ctypes.CDLL | None, _Clear | None]:
    """The library, looked for once a process; says so once where an installed package lacks it."""
    if os.environ.get("RAREFY_NATIVE") == "0":
        return Status(reason="switched off by RAREFY_NATIVE=0"), None, None
    path, installed = _find()
    if path is None:
        # Whoever runs a source tree that was never installed knows it; whoever installed it expects the kernels.
        reason = f"{_NAME} was not built (installed without a working C++ compiler)" if installed else "not installed"
        _LOG.log(logging.WARNING if installed else logging.INFO, _WITHOUT, reason)
        return Status(reason=reason), None, None
    try:
        library = ctypes.CDLL(str(path))
        abi = int(library.rarefy_abi_version())
    except (OSError, AttributeError) as error:
        return _unusable(path, f"{path} cannot be loaded: {error}")
    if abi != ABI_VERSION:
        return _unusable(path, f"{path} is of another version (interface {abi}, wanted {ABI_VERSION})")
    library.rarefy_isa.restype = ctypes.c_char_p
    isa = cast(bytes, library.rarefy_isa()).decode()
    asked = os.environ.get("RAREFY_ISA")
    if asked and asked != isa:
        _LOG.warning("RAREFY_ISA=%s is none of baseline, v3, v4 or not in this processor: %s is used", asked, isa)
    library.rarefy_clear.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.rarefy_clear.restype = ctypes.c_int
    return Status(path=path, isa=isa), library, cast(_Clear, library.rarefy_clear)


_WITHOUT = (
    "rarefy runs without its compiled kernels, correct but slower: %s. To have them, make a C++ compiler available and "
    "install rarefy again (pip: --no-deps --force-reinstall --no-cache-dir); RAREFY_NATIVE=0 accepts it as it is."
)


def _unusable(path: Path, reason: str) -> tuple[Status, None, None]:
    _LOG.warning(_WITHOUT, reason)
    return Status(path=path, reason=reason), None, None


def _find() -> tuple[Path | None, bool]:
    """The library and whether rarefy is installed: beside this package, or where an editable install has put it."""
    if asked := os.environ.get("RAREFY_LIBRARY"):
        return Path(asked), True
    here = Path(__file__).parents[1] / _NAME
    if here.is_file():
        return here, True
    try:
        there = Path(str(metadata.distribution("rarefy").locate_file(f"rarefy/{_NAME}")))
    except metadata.PackageNotFoundError:
        return None, False
    return (there if there.is_file() else None), True
