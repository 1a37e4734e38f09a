"""The most memory that a process has held, since it began or since it was asked last."""

import contextlib
import re
import resource
import sys
from pathlib import Path

from rarefy.core.memory import give_back

__all__ = ["high_water", "reset_high_water"]


def reset_high_water() -> int:
    """Set the high-water mark back to what is resident now, and return it, in bytes.

    What was freed before is given back to the system first (by glibc), so that it does not hide what comes. Where the
    system has no such mark (it is Linux's clear_refs) it stands as it is.
    """
    give_back()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return high_water()


def high_water() -> int:
    """The most bytes that were resident since the mark was set back, or since the process began."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
