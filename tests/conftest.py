"""What every test runs under: shapes and types checked at run time, one thread, deterministic kernels."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# beartype picks the items that it checks by random.getrandbits, in finalisers too, and the collector may call those
# while hypothesis draws: the global generator would move under it. So beartype binds a generator of its own.
with mock.patch("random.getrandbits", random.Random(0).getrandbits):
    from beartype.door import is_bearable

    is_bearable([0], list[int])

# Before the first import of rarefy, and here only: users pay nothing for the checks. An int is a float, as in PEP 484.
install_import_hook("rarefy", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

os.environ["RAREFY_CACHE"] = "0"  # choices measured by an earlier run, on a machine as busy as it was then
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

# torch's first calls are slow, so no deadline; the same examples in every run, so that a failure can be seen again.
hypothesis.settings.register_profile("rarefy", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rarefy")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Callable[[str], Path]:
    """`data_dir("FashionMNIST/raw")` is the path of that item of the data folder; without it the test is skipped.

    The folder is RAREFY_DATA, else ../shared/data beside the repository.
    """
    root = Path(os.environ.get("RAREFY_DATA") or REPOSITORY.parent / "shared" / "data")

    def find(item: str) -> Path:
        if not (root / item).exists():
            pytest.skip(f"needs the data item {item!r}, not found in {root}: set RAREFY_DATA to the folder that has it")
        return root / item

    return find
