"""Layout: how a module stores its weight, and the one order in which patterns read it."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """Reads a weight as (out, in, *kernel), the *canonical* shape that patterns and allocations work on.

    Linear, convolutions and embeddings are stored so. An embedding (num, dim) is read as out = num, in = dim, like the
    output head that may share it. A transposed convolution is stored as (in, out / groups, *kernel) and read as
    (out, in / groups, *kernel), so that a row holds everything that reaches one output channel. Stacked matrices (fused
    experts) are stored as (stacked, out, in), or (stacked, in, out) where transposed, and read as (stacked · out, in).

    transposed: stored inputs first. groups: of a transposed convolution; a plain one needs none. stacked: how many
    matrices lie along a first axis of their own; 0 for a weight that is one matrix.
    Raises ValueError if groups < 1, stacked < 0, or both are used.

    >>> import torch
    >>> layout = Layout(transposed=True, groups=2)
    >>> weight = torch.nn.ConvTranspose2d(4, 6, 3, groups=2).weight.detach()
    >>> weight.shape, layout.canonical(weight).shape
    (torch.Size([4, 3, 3, 3]), torch.Size([6, 2, 3, 3]))
    >>> torch.equal(layout.restore(layout.canonical(weight)), weight)
    True
    >>> Layout(transposed=True, stacked=4).canonical(torch.zeros(4, 3, 5)).shape
    torch.Size([20, 3])
    """

    transposed: bool = False
    groups: int = 1
    stacked: int = 0

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"Layout(groups={self.groups}): groups must be at least 1")
        if self.stacked < 0 or (self.stacked and self.groups > 1):
            raise ValueError(f"{self}: stacked must be 0 or more, and stacked matrices have no groups")

    def canonical(self, t: Tensor) -> Tensor:
        """A tensor in the weight's own layout, of any dtype, as (out, in, *kernel); a view where possible."""
        if self.stacked:
            self._fit(t, 3)
            return (t.transpose(1, 2) if self.transposed else t).flatten(0, 1)
        return self._swap(t, "the stored inputs") if self.transposed else t

    def restore(self, t: Tensor) -> Tensor:
        """The inverse of `canonical`; a view where possible."""
        if self.stacked:
            self._fit(t, 2)
            split = t.reshape(self.stacked, t.shape[0] // self.stacked, t.shape[1])
            return split.transpose(1, 2) if self.transposed else split
        return self._swap(t, "the outputs") if self.transposed else t

    def _fit(self, t: Tensor, dims: int) -> None:
        if t.dim() != dims or t.shape[0] % self.stacked or (dims == 3 and t.shape[0] != self.stacked):
            raise ValueError(
                f"{self} needs {dims} dimensions with {self.stacked} matrices along the first; got shape "
                f"{tuple(t.shape)}"
            )

    def _swap(self, t: Tensor, first: str) -> Tensor:
        """(g·a, b, *kernel) → (g·b, a, *kernel), group by group. Its own inverse, hence one function for both ways."""
        if t.dim() < 2 or t.shape[0] % self.groups:
            raise ValueError(
                f"{self} needs at least 2 dimensions and a multiple of {self.groups} along the first, which holds "
                f"{first}; got shape {tuple(t.shape)}"
            )
        split = t.reshape(self.groups, t.shape[0] // self.groups, *t.shape[1:])
        return split.transpose(1, 2).flatten(0, 1)
