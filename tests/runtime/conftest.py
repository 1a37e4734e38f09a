"""What tests of packing share: no times kept between runs, and clocks that say what is fastest."""

import pytest

from rarefy.runtime import measure
from runtime.nets import Clock, ratio


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", "0")


@pytest.fixture
def clock(monkeypatch, no_cache):
    """`clock(prefix, ...)`: candidates that begin so are fast, the first ones most; packed models are faster."""

    def install(*fast, whole=2.0):
        def price(name):
            order = next((i for i, prefix in enumerate(fast) if name.lower().startswith(prefix)), None)
            return (1 + order) * 1e-7 if order is not None else 8e-6 if name == "torch" else 9e-5

        made = Clock(price)
        monkeypatch.setattr(measure, "times", made.times)
        monkeypatch.setattr(measure, "ratios", ratio(whole))
        return made

    return install
