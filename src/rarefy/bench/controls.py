"""Controls: what is left of a method's advantage when one part of it is taken away.

shuffled        the method's final mask, shuffled within each layer, from the same first weights: do positions matter,
                or only how many weights each layer has?
reinitialised   the final mask itself, other first weights: is the mask tied to the weights that it was found with?
small_dense     a narrower dense network with no more parameters: is sparsity better than being small?
extended        the method, trained twice as long: does it need more time?

Frankle et al., "Pruning Neural Networks at Initialization: Why Are We Missing the Mark?", 2020, arXiv:2009.08576.
"""

import base64
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.axes.value import value
from rarefy.bench.seeds import generator
from rarefy.core import bits, choose
from rarefy.core.method import Method
from rarefy.core.sites import Site

__all__ = ["Given", "narrowed", "shuffled"]


@value
class Given(Method):
    """Masks from elsewhere, kept from the first step to the last. masks: name → packed bits, see `Given.of`."""

    masks: dict[str, str]

    stage: ClassVar[str] = "at init"

    @classmethod
    def of(cls, masks: Mapping[str, Tensor]) -> "Given":
        """The value that holds these boolean masks."""
        return cls(masks={name: _text(mask) for name, mask in masks.items()})

    def begin(self, s: Any) -> None:
        """Raises ValueError where the sites are not those of the masks."""
        names = [site.name for site in s.sites]
        if sorted(names) != sorted(self.masks):
            raise ValueError(f"masks are given for {', '.join(self.masks)}, but the sites are {', '.join(names)}")
        for site in s.sites:
            s.keep(site, _mask(self.masks[site.name], site.parameter.shape))


def shuffled(site: Site, mask: Tensor, seed: int) -> Tensor:
    """A random mask of the site's pattern with as many units as `mask`: same shape, same number of weights kept."""
    units = choose.units_of(site, mask)
    source = generator(f"shuffle {site.name}", seed)
    scores = torch.rand(units.shape, dtype=torch.float64, generator=source)
    return choose.fill(site, torch.zeros_like(units), scores, int(units.sum()))


def narrowed(parameters: Callable[[int], int], most: int) -> int:
    """The largest width with no more than `most` parameters, and at least 1. `parameters` grows with the width.

    >>> narrowed(lambda width: 10 * width, 105)
    10
    """
    width, step = 1, 1
    while parameters(width + step) <= most:
        step *= 2
    while step:
        width += step if parameters(width + step) <= most else 0
        step //= 2
    return width


def _text(mask: Tensor) -> str:
    return base64.b85encode(zlib.compress(bits.pack(mask).numpy().tobytes())).decode()


def _mask(text: str, shape: torch.Size) -> Tensor:
    packed = bytearray(zlib.decompress(base64.b85decode(text)))
    return bits.unpack(torch.frombuffer(packed, dtype=torch.uint8), shape)
