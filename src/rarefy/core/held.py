"""One parameter whose masked entries stay +0.0: its byte masks, its gradient hook, its dense gradient on demand.

Two masks, both int8 (see `bits`): `keep`, the support of the weight that the forward pass uses, and `train`, where
gradients reach the optimizer. None means everywhere; usually they are the same tensor.

The gradient is cleared as it accumulates, so that clipping and gradient norms see kept weights only. In a step whose
dense gradient is wanted, clearing waits for the end of the backward pass (by then a replicated gradient is reduced) and
the dense gradient is set aside. What later scales the gradient (clipping, unscaling) is read off its kept entries and
applied to the one set aside.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rarefy.core import bits


Everywhere = Literal["everywhere"]


def local(tensor: Tensor) -> Tensor:
    """The shard of a distributed tensor that lies here; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a distributed tensor, gathered; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole `tensor` that lies here, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local()


def whole(shard_of: Tensor, like: Tensor) -> Tensor:
    """The inverse of `shard`: gather what lies on every rank into the whole tensor."""
    if not isinstance(like, DTensor):
        return shard_of
    placed = DTensor.from_local(
        shard_of, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed.full_tensor()


class Held:
    """A parameter under a mask. Its state is data: `keep`, `train`, and for one step at most a dense gradient."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.keep: Tensor | None = None
        self.train: Tensor | None = None
        self.wants_dense = False
        self._dense: Tensor | None = None
        self._split: tuple[int, int] | None = None  # identity and version of the gradient when it was last cleared
        self._weight: tuple[int, int] | None = None  # storage and version of the weight after our last look
        self._hook: Any = None

    # -- masks ---------------------------------------------------------------------------------------------------

    def set(self, keep: Tensor, train: Tensor | Everywhere | None = None) -> None:
        """Adopt whole boolean masks; all-true masks are dropped, since holding nothing costs nothing.

        train: None for the same as `keep`.
        """
        self.keep = self._bytes(keep)
        if isinstance(train, str):
            self.train = None
        else:
            self.train = self.keep if train is None or train is keep else self._bytes(train)
        self._weight = self._split = None

    def _bytes(self, mask: Tensor) -> Tensor | None:
        if bits.count(mask) == mask.numel():
            return None
        return bits.encode(shard(mask, self.parameter), local(self.parameter))

    # -- weights -------------------------------------------------------------------------------------------------

    def clear_weight(self) -> None:
        """+0.0 wherever the mask is false."""
        if self.keep is not None:
            bits.clear_(local(self.parameter), self.keep)
        self.seen_weight()

    def seen_weight(self) -> None:
        """Remember the weight as known to be clear."""
        p = self.parameter
        self._weight = None if isinstance(p, DTensor) else (p.data_ptr(), p._version)

    @property
    def weight_untouched(self) -> bool:
        """Whether nothing wrote to the weight since our last look."""
        return self._weight is not None and self._weight == (self.parameter.data_ptr(), self.parameter._version)

    # -- gradients -----------------------------------------------------------------------------------------------

    def attach(self) -> None:
        if self.parameter.requires_grad:
            self._hook = self.parameter.register_post_accumulate_grad_hook(self._accumulated)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to one step."""
        self._dense = self._split = None

    def _accumulated(self, parameter: Tensor) -> None:
        if self.train is None and not self.wants_dense:
            return
        grad = parameter.grad
        assert grad is not None
        if self.wants_dense:
            self._restore(grad)
            engine = torch.autograd.Variable._execution_engine
            # Twice: replicas queue their reduction while the pass runs, so the second callback comes after it.
            engine.queue_callback(lambda: engine.queue_callback(self._set_aside))
        else:
            self._clear(grad)

    def _clear(self, grad: Tensor) -> None:
        if self.train is not None:
            bits.clear_(local(grad), self.train)
        self._split = (id(grad), grad._version)

    def _restore(self, grad: Tensor) -> None:
        """Another micro-batch was added to a gradient already split: put its masked part back, to be reduced whole.

        A single in-place addition moves the version by one; anything else means that the gradient was reset or replaced.
        """
        if self._dense is not None and self._split == (id(grad), grad._version - 1) and self.train is not None:
            with torch.no_grad():
                bits.clear_(self._dense, ~self.train)
                local(grad).add_(self._dense)
        self._dense = self._split = None

    def _set_aside(self) -> None:
        grad = self.parameter.grad
        if grad is None or self._dense is not None:
            return
        dense = local(grad).detach().clone()
        if bool(torch.isfinite(dense).all()):  # else leave it whole: a gradient scaler must see the overflow
            self._dense = dense
            self._clear(grad)

    def finalize(self) -> None:
        """Before the optimizer steps: the gradient is clear, and a wanted dense one is scaled as the kept part was."""
        grad = self.parameter.grad
        if grad is None:
            return
        if self.wants_dense and self._dense is None:  # gradients that came without a backward pass into the parameter
            self._dense = local(grad).detach().clone()
            self._clear(grad)
        elif self._split != (id(grad), grad._version):
            if self._dense is not None:
                self._scale_dense(local(grad))
            self._clear(grad)

    def _scale_dense(self, grad: Tensor) -> None:
        dense = self._dense
        if dense is None or self.train is None:
            self._dense = grad.detach().clone()
            return
        kept = dense.clone()
        bits.clear_(kept, self.train)
        norm = kept.double().square().sum()
        if norm > 0:
            dense.mul_(((kept.double() * grad.double()).sum() / norm).to(dense.dtype))

    def unscale(self, inverse: Tensor) -> None:
        """Multiply the dense gradient set aside by `inverse` (a fused optimizer unscales inside its kernel)."""
        if self._dense is not None:
            self._dense.mul_(inverse)

    def dense_gradient(self) -> Tensor:
        """The whole dense gradient; zeros where the backward pass did not reach the parameter."""
        if self._dense is not None:
            return whole(self._dense, self.parameter)
        if self.wants_dense and self.parameter.grad is None:
            return torch.zeros(self.parameter.shape, dtype=self.parameter.dtype, device=self.parameter.device)
        raise RuntimeError(
            f"the dense gradient of {self.name!r} was asked for in a step for which wants_dense_gradient() was false; "
            "it is gathered only where the method announces it before the forward pass."
        )

    def remask_gradient(self) -> None:
        """The masks changed after the gradient was cleared: clear it by the new ones, from the dense one if kept."""
        grad = self.parameter.grad
        if grad is None:
            return
        if self._dense is not None:
            with torch.no_grad():
                local(grad).copy_(self._dense)
        self._clear(grad)
