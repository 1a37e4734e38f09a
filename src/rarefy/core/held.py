"""One parameter whose masked entries stay +0.0: its byte masks, its gradient hook, its dense gradient on demand.

Two masks, both int8 (see `bits`): `keep`, the support of the weight that the forward pass uses, and `train`, where
gradients reach the optimizer. None means everywhere; usually they are the same tensor.

The gradient is cleared as it accumulates, so that clipping and gradient norms see kept weights only. In a step whose
dense gradient is wanted, clearing waits for the end of the backward pass (by then a replicated gradient is reduced) and
the dense gradient is set aside (see `dense`). What later scales the gradient (clipping, unscaling) is read off its kept
entries and applied to the one set aside; another micro-batch is added to the whole of it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.core import bits
from rarefy.core.dense import Dense

Everywhere = Literal["everywhere"]


def distributed(tensor: Tensor) -> Any:
    """The tensor where it is a distributed one (DTensor), else None.

    Their module takes half a second to import; before somebody has imported it, no tensor is one.
    """
    module: Any = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """The shard of a distributed tensor that lies here; any other tensor itself."""
    found = distributed(tensor)
    return tensor if found is None else found.to_local()


def full(tensor: Tensor) -> Tensor:
    """The whole of a distributed tensor, gathered; any other tensor itself."""
    found = distributed(tensor)
    return tensor if found is None else found.full_tensor()


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole `tensor` that lies here, cut as `like` is."""
    found = distributed(like)
    if found is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(tensor, found.device_mesh, found.placements, src_data_rank=None)
    return placed.to_local()


def whole(shard_of: Tensor, like: Tensor) -> Tensor:
    """The inverse of `shard`: gather what lies on every rank into the whole tensor."""
    found = distributed(like)
    if found is None:
        return shard_of
    from torch.distributed.tensor import DTensor

    placed = DTensor.from_local(
        shard_of, found.device_mesh, found.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed.full_tensor()


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that a compiled training or optimizer step calls as it is, instead of compiling it too."""
    return cast(Any, torch.compiler).disable(hook)


class Held:
    """A parameter under a mask. Its state is data: `keep`, `train`, and for one step at most a dense gradient."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.keep: Tensor | None = None
        self.train: Tensor | None = None
        self.wants_dense = False
        self.remembers = True  # whether anybody will ask if a gradient is clear
        self.dense: Dense | None = None
        self._carries = False  # `dense` belongs to the gradient that is being added to
        self._cleared: tuple[weakref.ref[Tensor], int] | None = None  # the gradient when last cleared, its version
        self._hooks: list[RemovableHandle] = []

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
        self._cleared = None

    def _bytes(self, mask: Tensor) -> Tensor | None:
        if bits.count(mask) == mask.numel():
            return None
        return bits.encode(shard(mask, self.parameter), local(self.parameter))

    def movable(self) -> bool:
        """Whether the weight may be given other memory: a plain parameter on the CPU, of one piece."""
        parameter = self.parameter
        return type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.is_contiguous()

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Let the masks be what `to` makes of them, the same elsewhere; and the weight, unless it is clear, what `to`
        makes of a cleared copy: what it was is not written to where it can be replaced, for it may map a file."""
        same = self.train is self.keep
        self.keep = None if self.keep is None else to(self.keep)
        self.train = self.keep if same else None if self.train is None else to(self.train)
        if self.keep is None or self.is_clear():
            return
        if not self.movable():
            self.clear_weight()
            return
        weight = self.parameter.detach().clone()
        bits.clear_(weight, self.keep)
        self.parameter.data = to(weight)

    def is_clear(self) -> bool:
        """Whether the weight is +0.0 wherever the mask is false already; nothing is written."""
        return self.keep is None or bits.is_clear(local(self.parameter), self.keep)

    def clear_weight(self) -> None:
        """+0.0 wherever the mask is false.

        To be done at every step, whatever the version counter of the weight says: `.data` writes do not move it.
        """
        if self.keep is not None:
            weight = self.parameter
            bits.clear_(weight if type(weight) is nn.Parameter else local(weight), self.keep)

    # -- gradients as they accumulate ----------------------------------------------------------------------------

    def attach(self) -> None:
        """Watch the gradient; of a frozen parameter too, for it may be trained later."""
        self._hook("register_post_accumulate_grad_hook", self._accumulated)

    def detach(self) -> None:
        """Take every hook off again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.wants_dense = False
        self.dense = self._cleared = None

    def want_dense(self, wanted: bool) -> None:
        """Whether the backward passes to come leave their gradient whole, to be set aside."""
        self.wants_dense = wanted
        for hook in self._hooks[1:]:
            hook.remove()
        del self._hooks[1:]
        if not wanted:
            self.dense = None
        elif self._hooks:
            self._hook("register_hook", self._accumulating)

    def _hook(self, register: str, hook: Callable[[Tensor], None]) -> None:
        frozen = not self.parameter.requires_grad
        self.parameter.requires_grad_(True)  # torch puts hooks on no other
        self._hooks.append(getattr(self.parameter, register)(uncompiled(hook)))
        self.parameter.requires_grad_(not frozen)

    def _accumulating(self, incoming: Tensor) -> None:
        """Before a gradient is added to what is there. What happened to that since (scaling, a reset to zero) is read
        off its kept part now, while it stands alone. Passes that only ask for gradients come here too.
        """
        grad = self.parameter.grad
        self._carries = grad is not None and self.dense is not None
        if grad is not None and self.dense is not None:
            self.dense.follow(local(grad))

    def _accumulated(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            raise RuntimeError(
                f"the gradient of {self.name!r} was taken away inside the backward pass, by a hook that came first "
                "(an optimizer in the backward pass?): step after backward(), or detach the handle."
            )
        if self.wants_dense:
            self._accumulated_whole(grad)
        elif self.train is not None:
            self._clear(grad)

    def _accumulated_whole(self, grad: Tensor) -> None:
        if self.dense is not None and (self._carries or self._added_to_shard(grad)):
            self.dense.put_back(local(grad))  # the sum over micro-batches is to be whole
        self.dense, self._carries = None, False
        engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportPrivateUsage]
        # Twice: replicas queue their reduction while the pass runs, so the second callback comes after it.
        engine.queue_callback(uncompiled(lambda: engine.queue_callback(uncompiled(self._set_aside))))

    def _added_to_shard(self, grad: Tensor) -> bool:
        """Sharded gradients pass `_accumulating` by: a single addition in place moves the version by one."""
        if self._cleared is None or distributed(grad) is None:
            return False
        of, version = self._cleared
        return of() is _stored(grad) and _stored(grad)._version == version + 1

    def _set_aside(self) -> None:
        grad = self.parameter.grad
        if grad is None or self.dense is not None:
            return
        dense = local(grad).detach().clone()
        if bool(torch.isfinite(dense).all()):  # else leave it whole: a gradient scaler must see the overflow
            self._split(grad, dense)

    def _split(self, grad: Tensor, dense: Tensor) -> None:
        self.dense = Dense(dense, self.train)
        self._clear(grad)

    def _clear(self, grad: Tensor) -> None:
        if self.train is not None:
            if grad.layout is not torch.strided:
                raise ValueError(
                    f"the gradient of {self.name!r} is sparse, so it says nothing about masked weights: "
                    "give sparse=False to its embedding, or skip it."
                )
            bits.clear_(grad if type(grad) is Tensor else local(grad), self.train)
        if self.remembers:
            stored = _stored(grad)
            self._cleared = (weakref.ref(stored), stored._version)

    # -- gradients as they are final -----------------------------------------------------------------------------

    def finalize(self, *, trust: bool) -> None:
        """Before the optimizer steps: the gradient is clear, and a wanted dense one is scaled as the kept part was.

        trust: whether a gradient that looks untouched since it was cleared may be taken as clear.
        """
        grad = self.parameter.grad
        if grad is None:
            self.dense = None
        elif self.wants_dense:
            self._finalize_dense(grad)
        elif self.train is not None and not (trust and self._is_clear(grad)):
            self._clear(grad)

    def _finalize_dense(self, grad: Tensor) -> None:
        if self.dense is not None and not self._is_another(grad, self.dense):
            self.dense.follow(local(grad))
            self._clear(grad)
        elif self.train is None or not self._is_clear(grad):  # it came without a backward pass into the parameter
            self._split(grad, local(grad).detach().clone())

    def _is_clear(self, grad: Tensor) -> bool:
        """Whether nothing has visibly written to the gradient since it was cleared."""
        if self._cleared is None:
            return False
        of, version = self._cleared
        return of() is _stored(grad) and version == _stored(grad)._version

    def _is_another(self, grad: Tensor, dense: Dense) -> bool:
        """Whether somebody put another gradient in place, and a whole one."""
        if self._cleared is not None and self._cleared[0]() is _stored(grad):
            return False
        return bool(dense.rest(local(grad)).any())

    def unscale(self, inverse: Tensor) -> None:
        """Multiply the dense gradient set aside by `inverse` (a fused optimizer unscales inside its kernel)."""
        if self.dense is not None:
            self.dense.whole.mul_(inverse.to(self.dense.whole.device))

    def dense_gradient(self) -> Tensor:
        """The whole dense gradient; zeros where the backward pass did not reach the parameter."""
        if self.dense is not None:
            return whole(self.dense.whole, self.parameter)
        grad = self.parameter.grad
        if self.wants_dense and grad is None:
            return torch.zeros(self.parameter.shape, dtype=self.parameter.dtype, device=self.parameter.device)
        if self.wants_dense and grad is not None and (self.train is None or not self._is_clear(grad)):
            return full(grad).detach()
        raise RuntimeError(
            f"the dense gradient of {self.name!r} was asked for in a step for which wants_dense_gradient() was false; "
            "it is gathered only where the method announces it before the forward pass."
        )

    def remask_gradient(self) -> None:
        """The masks changed after the gradient was cleared: clear it by the new ones, from the dense one if kept."""
        grad = self.parameter.grad
        if grad is None:
            return
        if self.dense is not None:
            self.dense.put_back(local(grad))
            self.dense.by = self.train
        self._clear(grad)


def _stored(grad: Tensor) -> Tensor:
    """The tensor whose version moves when a gradient is written to."""
    found = distributed(grad)
    return grad if found is None else found._local_tensor
