"""Finding and loading the compiled kernels, doing without them, and saying so once."""

import ctypes
import importlib.metadata
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

from rarefy.core import bits, native

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def fresh(monkeypatch):
    """The library is looked for anew, with no variable set."""
    monkeypatch.delenv("RAREFY_ISA", raising=False)
    monkeypatch.delenv("RAREFY_NATIVE", raising=False)
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.fixture
def library(fresh, tmp_path) -> Path:
    """A copy of the library, which chooses its instruction set anew when it is loaded."""
    built = native.status().path
    native._load.cache_clear()
    if built is None:
        pytest.skip("rarefy is not installed with its kernels")
    return Path(shutil.copy(built, tmp_path))


def hold_zeros() -> None:
    x = torch.tensor([1.0, 2.0])
    bits.clear_(x, torch.tensor([-1, 0], dtype=torch.int8))
    assert x.tolist() == [1, 0]


def test_an_editable_install_with_a_compiler_has_the_kernels(fresh):
    """Warnings are errors there, and a build that fails leaves a package without kernels: it must not go unnoticed."""
    try:
        installed = importlib.metadata.distribution("rarefy").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    url = json.loads(installed or "{}")
    if not url.get("dir_info", {}).get("editable") or url["url"] != REPOSITORY.as_uri():
        pytest.skip("this tree is not installed")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    assert native.status().isa, "the kernels were not built: `pip install -v --no-deps -e .` shows why"


def test_the_interface_is_that_of_the_header():
    header = (REPOSITORY / "kernels" / "rarefy.h").read_text()
    assert re.findall(r"#define RAREFY_ABI_VERSION (\d+)", header) == [str(native.ABI_VERSION)]


def test_a_width_that_no_kernel_has_touches_nothing(library):
    kernel = ctypes.CDLL(str(library)).rarefy_clear
    kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = ctypes.create_string_buffer(b"\x07" * 64, 64)
    for width in (0, 3, 16, -1):
        assert kernel(memory, bytes(4), 4, width) == 1
    assert memory.raw == b"\x07" * 64


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_the_instruction_set_can_be_chosen(library, isa, monkeypatch, caplog):
    monkeypatch.setattr(native, "_find", lambda: (library, True))
    monkeypatch.setenv("RAREFY_ISA", isa)
    status = native.status()
    if isa != "baseline" and status.isa != isa:
        pytest.skip(f"this processor has no {isa}")
    assert str(status) == f"compiled kernels: {isa}, {library}"
    assert not caplog.records
    hold_zeros()


def test_a_wrong_instruction_set_is_named(library, monkeypatch, caplog):
    monkeypatch.setattr(native, "_find", lambda: (library, True))
    monkeypatch.setenv("RAREFY_ISA", "avx1024")
    assert native.status().isa in {"baseline", "v3", "v4"}
    assert caplog.records[0].getMessage().startswith("RAREFY_ISA=avx1024 is none of baseline, v3, v4 or")
    hold_zeros()


def test_the_kernels_can_be_switched_off(fresh, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("RAREFY_NATIVE", "0")
    hold_zeros()
    assert str(native.status()) == "no compiled kernels: switched off by RAREFY_NATIVE=0"
    assert not caplog.records


@pytest.mark.parametrize("installed", [True, False])
def test_without_kernels_torch_does_it_and_an_install_says_so_once(fresh, monkeypatch, caplog, installed):
    monkeypatch.setattr(native, "_find", lambda: (None, installed))
    assert not caplog.records  # nobody has wanted them yet
    hold_zeros()
    hold_zeros()
    assert native.status().path is native.status().isa is None
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == installed
    assert all("correct but slower" in s and "C++ compiler" in s and "RAREFY_NATIVE=0" in s for s in said)


def test_kernels_are_not_missed_where_no_memory_is_on_the_cpu(fresh, monkeypatch, caplog):
    monkeypatch.setattr(native, "_find", lambda: (None, True))
    bits.clear_(torch.empty(2, device="meta"), torch.empty(2, dtype=torch.int8, device="meta"))
    assert not caplog.records


def test_a_library_that_cannot_be_loaded(fresh, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "librarefy.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_find", lambda: (broken, True))
    hold_zeros()
    assert "cannot be loaded" in str(native.status())
    assert len(caplog.records) == 1


def test_a_library_of_another_version(library, monkeypatch, caplog):
    monkeypatch.setattr(native, "_find", lambda: (library, True))
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    hold_zeros()
    assert "is of another version (interface" in str(native.status())
    assert len(caplog.records) == 1


def test_where_the_library_is_looked_for(fresh, monkeypatch, tmp_path):
    """Beside the package first, then where the installed distribution has it; nowhere else."""
    package, site = tmp_path / "src" / "rarefy", tmp_path / "site-packages"
    (package / "core").mkdir(parents=True)
    (site / "rarefy").mkdir(parents=True)
    monkeypatch.setattr(native, "__file__", str(package / "core" / "native.py"))

    def absent(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert native._find() == (None, False)
    installed = importlib.metadata.PathDistribution(site / "rarefy-0.dist-info")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    assert native._find() == (None, True)
    (site / "rarefy" / "librarefy.so").touch()
    assert native._find() == (site / "rarefy" / "librarefy.so", True)
    (package / "librarefy.so").touch()
    assert native._find() == (package / "librarefy.so", True)
