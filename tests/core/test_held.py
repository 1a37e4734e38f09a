"""One parameter under a mask: what is cleared when, and what is known of a dense gradient."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.dense import Dense
from rarefy.core.held import Held, local
from recorder import bits_of, checkered, same

F64 = torch.float64


def make(dtype: torch.dtype = F64, **arguments: bool) -> Held:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, generator=generator, dtype=F64).to(dtype), **arguments)
    held = Held("weight", weight)
    held.set(checkered((4, 6)))
    return held


def gradient(seed: int = 1) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)


def backward(held: Held, incoming: Tensor) -> None:
    (held.parameter * incoming.to(held.parameter.dtype)).sum().backward()


def grad_of(held: Held) -> Tensor:
    assert held.parameter.grad is not None
    return held.parameter.grad


KEPT = checkered((4, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_clearing_leaves_plus_zero_whatever_stood_there(dtype: torch.dtype) -> None:
    held = make(dtype)
    with torch.no_grad():
        held.parameter[~KEPT] = torch.tensor([-0.0, float("nan"), float("-inf"), 1.0] * 4, dtype=dtype)
    before = held.parameter.detach().clone()
    held.clear_weight()
    assert not bits_of(held.parameter)[~KEPT].any()
    assert same(held.parameter[KEPT], before[KEPT])


def test_a_full_mask_holds_nothing() -> None:
    held = make()
    held.set(torch.ones(4, 6, dtype=torch.bool))
    assert held.keep is None
    assert held.train is None
    before = held.parameter.detach().clone()
    held.clear_weight()
    assert same(held.parameter, before)


def test_the_two_masks_are_one_unless_they_differ() -> None:
    held = make()
    assert held.train is held.keep
    held.set(KEPT, "everywhere")
    assert held.train is None
    wider = KEPT | checkered((4, 6), moved=1)
    held.set(KEPT, wider)
    held.attach()
    backward(held, gradient())
    assert same(grad_of(held), gradient() * wider + 0.0)
    held.clear_weight()
    assert not held.parameter[~KEPT].any()


def test_gradients_are_cleared_as_they_accumulate() -> None:
    held = make()
    held.attach()
    backward(held, gradient())
    assert not bits_of(grad_of(held))[~KEPT].any()
    assert same(grad_of(held)[KEPT], gradient()[KEPT])
    held.detach()
    backward(held, gradient())
    assert grad_of(held)[~KEPT].any()


def test_a_frozen_parameter_is_watched_for_the_day_when_it_is_not() -> None:
    held = make(requires_grad=False)
    held.attach()
    assert not held.parameter.requires_grad
    held.want_dense(True)
    assert not held.parameter.requires_grad
    held.want_dense(False)
    held.parameter.requires_grad_(True)
    backward(held, gradient())
    assert not grad_of(held)[~KEPT].any()


@pytest.mark.parametrize("trust", [False, True])
def test_finalize_clears_what_was_written_later(trust: bool) -> None:
    held = make()
    held.attach()
    backward(held, gradient())
    grad_of(held).add_(1.0)
    held.finalize(trust=trust)
    assert not bits_of(grad_of(held))[~KEPT].any()
    grad_of(held).data.add_(1.0)  # nobody can see this one
    held.finalize(trust=trust)
    assert bool(grad_of(held)[~KEPT].any()) == trust
    held.parameter.grad = gradient(2)
    held.finalize(trust=trust)
    assert not grad_of(held)[~KEPT].any()


def test_a_new_gradient_at_the_old_address_is_not_taken_for_the_old_one() -> None:
    held = make()
    held.attach()
    for seed in range(30):
        held.parameter.grad = None
        held.parameter.grad = gradient(seed)
        held.finalize(trust=True)
        assert not grad_of(held)[~KEPT].any()


def test_the_dense_gradient_of_one_pass_and_of_two() -> None:
    held = make()
    held.attach()
    held.want_dense(True)
    backward(held, gradient(1))
    assert same(grad_of(held)[KEPT], gradient(1)[KEPT])
    assert not grad_of(held)[~KEPT].any()
    assert same(held.dense_gradient(), gradient(1))
    backward(held, gradient(2))
    assert not grad_of(held)[~KEPT].any()
    torch.testing.assert_close(held.dense_gradient(), gradient(1) + gradient(2), rtol=1e-14, atol=0)


def test_no_dense_gradient_is_known_unless_it_was_wanted_before() -> None:
    held = make()
    held.attach()
    backward(held, gradient())
    with pytest.raises(RuntimeError, match=r"'weight'.*announces it before the forward pass"):
        held.dense_gradient()
    held.want_dense(True)
    held.finalize(trust=True)
    with pytest.raises(RuntimeError, match=r"'weight'.*announces it before the forward pass"):
        held.dense_gradient()  # it was cleared already: there is nothing but zeros to show
    backward(held, gradient(2))
    assert held.dense_gradient()[~KEPT].any()


def test_no_gradient_is_a_dense_gradient_of_zeros() -> None:
    held = make()
    held.attach()
    held.want_dense(True)
    assert same(held.dense_gradient(), torch.zeros(4, 6, dtype=F64))
    backward(held, gradient())
    held.parameter.grad = None
    held.finalize(trust=False)
    assert same(held.dense_gradient(), torch.zeros(4, 6, dtype=F64))


def test_an_overflow_stays_in_the_gradient_for_a_scaler_to_see() -> None:
    held = make()
    held.attach()
    held.want_dense(True)
    wrong = gradient().masked_fill(~KEPT, float("inf"))
    backward(held, wrong)
    assert bool(grad_of(held).isinf().any())
    held.finalize(trust=False)
    assert same(held.dense_gradient(), wrong)
    assert not grad_of(held).isinf().any()


def test_new_masks_take_the_gradient_at_grown_positions_from_the_dense_one() -> None:
    held = make()
    held.attach()
    held.want_dense(True)
    backward(held, gradient())
    held.finalize(trust=False)
    grad_of(held).add_(10.0 * KEPT)  # as a penalty that a method adds
    moved = checkered((4, 6), moved=1) | (KEPT & (torch.arange(24).reshape(4, 6) < 12))
    held.set(moved)
    held.remask_gradient()
    expected = torch.where(moved, gradient() + 10.0 * KEPT, 0.0)
    torch.testing.assert_close(grad_of(held), expected, rtol=1e-14, atol=0)
    held.set(torch.ones(4, 6, dtype=torch.bool))
    held.remask_gradient()
    assert bool((grad_of(held) != 0).sum() > moved.sum())


def test_new_masks_without_a_dense_gradient_clear_what_is_there() -> None:
    held = make()
    held.attach()
    held.remask_gradient()  # no gradient at all
    backward(held, gradient())
    held.set(checkered((4, 6), moved=1))
    held.remask_gradient()
    assert not grad_of(held).any()


def test_when_the_dense_gradient_is_not_wanted_any_more_it_goes() -> None:
    held = make()
    held.attach()
    held.want_dense(True)
    backward(held, gradient())
    whole = weakref.ref(held.dense.whole) if held.dense is not None else None
    assert whole is not None
    held.want_dense(False)
    gc.collect()
    assert whole() is None


def test_the_parameter_is_copied_and_pickled_as_any_other() -> None:
    held = make()
    held.attach()
    held.want_dense(True)
    backward(held, gradient())
    for twin in (copy.deepcopy(held.parameter), pickle.loads(pickle.dumps(held.parameter))):  # noqa: S301
        assert same(twin, held.parameter)
        assert not twin._post_accumulate_grad_hooks
        assert not twin._backward_hooks


def test_no_gradient_tensor_is_kept_alive() -> None:
    held = make()
    held.attach()
    backward(held, gradient())
    found = weakref.ref(grad_of(held))
    held.parameter.grad = None
    gc.collect()
    assert found() is None


# -- Dense -------------------------------------------------------------------------------------------------------------


def split(whole: Tensor) -> tuple[Dense, Tensor]:
    held = make(whole.dtype)
    return Dense(whole.clone(), held.train), torch.where(KEPT, whole, 0.0)


@pytest.mark.parametrize("factor", [1.0, 0.0, 2.0**-16, 3.0, -1.0, 0.0123])
def test_the_rest_is_scaled_as_the_kept_part(factor: float) -> None:
    dense, kept = split(gradient().float())
    scale = torch.tensor(factor)
    dense.follow(kept * scale)
    assert torch.equal(dense.whole, gradient().float() * scale)
    assert dense.scale is not None
    assert torch.equal(dense.scale, scale)


def test_following_twice_is_following_once() -> None:
    dense, kept = split(gradient())
    dense.follow(kept * 0.3)
    before = dense.whole.clone()
    dense.follow(kept * 0.3)
    torch.testing.assert_close(dense.whole, before, rtol=1e-14, atol=0)


def test_what_is_no_scaling_becomes_the_nearest() -> None:
    """Least squares: c = ⟨kept, now⟩ / ⟨kept, kept⟩ = (1·1 + 2·1) / (1 + 4)."""
    keep = torch.tensor([-1, -1, 0], dtype=torch.int8)
    dense = Dense(torch.tensor([1.0, 2.0, 5.0]), keep)
    dense.follow(torch.tensor([1.0, 1.0, 7.0]))
    torch.testing.assert_close(dense.whole, torch.tensor([1.0, 1.0, 3.0]))


def test_a_kept_part_of_zeros_cannot_tell() -> None:
    keep = torch.tensor([-1, 0], dtype=torch.int8)
    dense = Dense(torch.tensor([0.0, 4.0]), keep)
    dense.follow(torch.tensor([0.0, 0.0]))
    assert dense.scale is None
    assert dense.whole.tolist() == [0.0, 4.0]
    dense.rescale(torch.tensor(0.5))
    assert dense.whole.tolist() == [0.0, 2.0]


def test_where_nothing_is_masked_the_gradient_is_the_dense_one() -> None:
    dense = Dense(gradient(), None)
    dense.follow(gradient(2))
    assert same(dense.whole, gradient(2))
    target = gradient(3)
    dense.put_back(target)
    assert same(target, gradient(3))


def test_local_is_the_tensor_itself() -> None:
    tensor = torch.ones(2)
    assert local(tensor) is tensor
