"""Layout: how a module stores its weight, and the one order in which patterns read it."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """Reads a weight as (out, in, *kernel), the *canonical* shape that patterns and allocations work on.

    Linear, convolutions and embeddings are stored so. An embedding (num, dim) is read as out = num, in = dim, like the
    output head that may share it. A transposed convolution is stored as (in, out / groups, *kernel) and read as
    (out, in / groups, *kernel), so that a row holds everything that reaches one output channel.

    transposed: stored inputs first. groups: of a transposed convolution; a plain one needs none.
    Raises ValueError if groups < 1.

    >>> import torch
    >>> layout = Layout(transposed=True, groups=2)
    >>> weight = torch.nn.ConvTranspose2d(4, 6, 3, groups=2).weight.detach()
    >>> weight.shape, layout.canonical(weight).shape
    (torch.Size([4, 3, 3, 3]), torch.Size([6, 2, 3, 3]))
    >>> torch.equal(layout.restore(layout.canonical(weight)), weight)
    True
    """

    transposed: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"Layout(groups={self.groups}): groups must be at least 1")

    def canonical(self, t: Tensor) -> Tensor:
        """A tensor in the weight's own layout, of any dtype, as (out, in, *kernel); a view where possible."""
        return self._swap(t, "the stored inputs") if self.transposed else t

    def restore(self, t: Tensor) -> Tensor:
        """The inverse of `canonical`; a view where possible."""
        return self._swap(t, "the outputs") if self.transposed else t

    def _swap(self, t: Tensor, first: str) -> Tensor:
        """(g·a, b, *kernel) → (g·b, a, *kernel), group by group. Its own inverse, hence one function for both ways."""
        if t.dim() < 2 or t.shape[0] % self.groups:
            raise ValueError(
                f"{self} needs at least 2 dimensions and a multiple of {self.groups} along the first, which holds "
                f"{first}; got shape {tuple(t.shape)}"
            )
        split = t.reshape(self.groups, t.shape[0] // self.groups, *t.shape[1:])
        return split.transpose(1, 2).flatten(0, 1)
