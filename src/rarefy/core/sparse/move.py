"""Another structure: values, gradient and optimizer state go along; what is new starts at zero, its state anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from rarefy.core import optimizers as table
from rarefy.core.sparse.linear import dense_like, exchange_data
from rarefy.core.sparse.site import SparseHeld, SparseSite
from rarefy.core.sparse.structure import Structure


def move(site: SparseSite, positions: Tensor, optimizers: Sequence[Optimizer]) -> int:
    """Keep exactly the weights at these positions (int64, ascending); returns how many mask entries change.

    Layer, Parameter and, where the count stays, their memory are the same afterwards.
    """
    structure, parameter = site.structure, site.parameter
    old = structure.positions()
    if torch.equal(old, positions):
        return 0
    came = _Carried(old, positions)
    held = site.held
    assert isinstance(held, SparseHeld)
    values, grad = parameter.detach(), parameter.grad
    moved = came(values)
    structure.become(Structure.of_positions(positions, structure.rows, structure.cols))
    regrown = None if grad is None else _gradient(held, structure, grad, came)
    owner = table.owner(optimizers, parameter)
    if owner is not None:
        for name, state, initial in table.per_weight(owner, parameter, values.shape):
            owner.state[parameter][name] = _written(state, came(state, moved if initial is None else initial))
        if isinstance(owner, torch.optim.LBFGS):
            table.forget_history(owner)
    _write(site, moved, regrown)
    return came.changes


def _write(site: SparseSite, values: Tensor, grad: Tensor | None) -> None:
    parameter = site.parameter
    if values.shape != parameter.shape:
        exchange_data(parameter, values, grad)
        return
    with torch.no_grad():
        parameter.copy_(values)
    if grad is not None and parameter.grad is not None:
        parameter.grad.detach().copy_(grad)


def _gradient(held: SparseHeld, structure: Structure, grad: Tensor, came: _Carried) -> Tensor:
    """What the optimizer would see at new positions: the dense gradient, if this step has one."""
    fresh = 0.0 if held.gathered is None else held.gathered.at(structure, grad)
    return came(grad.detach(), fresh)


class _Carried:
    """Vectors over old positions become vectors over new ones."""

    def __init__(self, old: Tensor, new: Tensor) -> None:
        self._from = torch.searchsorted(old, new).clamp_(max=max(0, len(old) - 1))
        self._same = old[self._from] == new if len(old) else torch.zeros(len(new), dtype=torch.bool)
        stay = int(self._same.sum())
        self.changes = len(old) + len(new) - 2 * stay

    def __call__(self, vector: Tensor, fresh: Tensor | float = 0.0) -> Tensor:
        """`fresh` where a position is new."""
        if not len(vector):
            return vector.new_zeros(len(self._same)) + fresh
        return torch.where(self._same, vector[self._from], torch.as_tensor(fresh, dtype=vector.dtype))


def _written(state: Tensor, new: Tensor) -> Tensor:
    return state.copy_(new) if state.shape == new.shape else new


# -- in and out ------------------------------------------------------------------------------------------------------


def gather_state(site: SparseSite, optimizers: Sequence[Optimizer]) -> None:
    """State that an optimizer made while the weight was dense (or loaded): its part at the non-zeros."""
    shape, positions = torch.Size(site.stored_shape), site.structure.positions
    _reshape_state(site, optimizers, shape, lambda state, initial: state.reshape(-1)[positions()])


def scatter_state(site: SparseSite, optimizers: Sequence[Optimizer]) -> None:
    """The inverse, before the weight is dense again: initial state elsewhere."""
    structure = site.structure
    shape = torch.Size([structure.nonzeros])
    _reshape_state(site, optimizers, shape, lambda state, initial: dense_like(state, structure, initial or 0.0))


def _reshape_state(
    site: SparseSite,
    optimizers: Sequence[Optimizer],
    shape: torch.Size,
    change: Callable[[Tensor, float | None], Tensor],
) -> None:
    parameter = site.parameter
    for optimizer in optimizers:
        for name, state, initial in table.per_weight(optimizer, parameter, shape):
            optimizer.state[parameter][name] = change(state, initial)
        if isinstance(optimizer, torch.optim.LBFGS) and table.owner([optimizer], parameter) is not None:
            table.forget_misfit(optimizer)
