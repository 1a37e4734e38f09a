import sys

import numpy as np
import pytest

from rarefy.bench.memory import high_water, reset_high_water


@pytest.mark.skipif(sys.platform != "linux", reason="the mark can be set back on Linux alone")
def test_the_mark_is_set_back():
    size = 200 << 20
    first = high_water()
    np.ones(size, dtype=np.uint8)
    grown = high_water()
    assert grown >= size
    assert grown >= first
    before = reset_high_water()
    assert before <= grown - size // 2
    assert high_water() < before + size // 2
    np.ones(size, dtype=np.uint8)
    assert high_water() >= before + size // 2


def test_it_is_more_than_torch_takes():
    assert 50e6 < high_water() < 1e12
