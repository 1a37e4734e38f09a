"""The kernels' tests run once for every instruction set that this processor has."""

import ctypes
import shutil

import pytest

from rarefy.core import native
from rarefy.runtime import kernels


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> dict[str, ctypes.CDLL]:
    """By instruction set: a library chooses its own once, when it is loaded, so each has a copy."""
    built = native.status().path
    found: dict[str, ctypes.CDLL] = {}
    if built is None:
        return found
    for isa in ("baseline", "v3", "v4"):
        copy = shutil.copy(built, tmp_path_factory.mktemp(isa) / built.name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAREFY_ISA", isa)
            library = ctypes.CDLL(str(copy))
            library.rarefy_isa.restype = ctypes.c_char_p
            patch.setattr(native, "library", lambda library=library: library)
            ready = kernels.library.__wrapped__()
        if ready is not None and library.rarefy_isa().decode() == isa:
            found[isa] = ready
    return found


@pytest.fixture(params=["baseline", "v3", "v4"])
def isa(request, libraries, monkeypatch) -> str:
    """The instruction set on which `rarefy.runtime.kernels` runs in this test."""
    if request.param not in libraries:
        pytest.skip(f"no kernels, or this processor has no {request.param}")
    monkeypatch.setattr(kernels, "library", lambda: libraries[request.param])
    return request.param
