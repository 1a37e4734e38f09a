"""Dense: nothing is masked. The reference of every comparison, under the same handle, ledger and table."""

import torch

from rarefy.axes import value
from rarefy.core.method import Method, register
from rarefy.core.sparsity import Sparsity


@register
@value
class Dense(Method):
    """Keep every weight."""

    stage = "baseline"
    labels = ("static", "dense", "real")

    def begin(self, s: Sparsity) -> None:
        for site in s.sites:
            s.keep(site, torch.ones_like(site.mask))
