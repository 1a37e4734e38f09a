"""What all tests stand on."""

import random

import pytest
import torch

from rarefy.axes import top_k
from rarefy.core.sites import find_sites


def test_the_checks_of_types_leave_the_global_generator_alone():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    before = random.getstate()
    for _ in range(10):
        assert len(find_sites(model, skip=["0", "1"])) == 1
    assert random.getstate() == before


def test_the_checks_of_types_are_on():
    with pytest.raises(Exception, match="type"):
        top_k("scores", 1)  # pyright: ignore[reportArgumentType]
