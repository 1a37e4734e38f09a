"""Gradients are final in `on_gradients`: clipped, noisy, and events in any order."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from laws.gradients import F64, WEIGHTS, masked, plain_gradients, plain_of, sgd, total_norm
from recorder import Told, checkered, loss_of, net, nonzeros, recorded, same


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_the_norm_counts_kept_weights_and_scales_the_dense_gradient(
    dtype: torch.dtype, foreach: bool, parts: int
) -> None:
    model = net(dtype)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=2)
    for step in range(6):
        whole = plain_gradients(model, lambda m, step=step: sum(loss_of(m, 10 * step + i, dtype) for i in range(parts)))
        optimizer.zero_grad()
        for i in range(parts):
            loss_of(model, 10 * step + i, dtype).backward()
        norm = clip_grad_norm_(model.parameters(), 0.1, foreach=foreach)
        close = 1e-12 if dtype == F64 else 1e-6
        torch.testing.assert_close(norm.double(), total_norm(masked(whole)), rtol=close, atol=0)
        optimizer.step()
        if step % 2 and parts == 1:
            factor = torch.clamp(0.1 / (norm + 1e-6), max=1.0)
            for name in WEIGHTS:
                dense, expected = log.told[-1].dense[name], whole[name] * factor
                if dtype == torch.float32:
                    assert torch.equal(dense, expected)  # the factor itself, not one close to it
                else:
                    torch.testing.assert_close(dense, expected, rtol=1e-14, atol=0)


def test_gradients_clipped_by_value_keep_the_order_of_the_dense_one() -> None:
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    expected = plain_gradients(model, lambda m: loss_of(m, 0, F64))
    loss_of(model, 0, F64).backward()
    clip_grad_value_(model.parameters(), 0.02)
    optimizer.step()
    for name in WEIGHTS:
        dense, whole, kept = log.told[0].dense[name], expected[name], checkered(expected[name].shape)
        assert same(dense[kept], whole[kept].clamp(-0.02, 0.02))
        ratio = dense[~kept] / whole[~kept]
        assert torch.allclose(ratio, ratio[0])
        assert 0 < ratio[0] < 1


def test_a_site_whose_kept_gradient_is_zero_is_scaled_as_the_others() -> None:
    """Its kept weights see a dead input, so that only the others tell by how much the gradients were scaled."""
    model = net(F64)
    optimizer = sgd(model)
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    _, log = recorded(model, optimizer, dense=1)

    def loss(m: nn.Module) -> Tensor:
        return (m[0].weight * ~checkered((8, 6))).sum() + m[2].weight.square().sum()

    expected = plain_gradients(model, loss)
    loss(model).backward()
    assert not model[0].weight.grad.any()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.125)
    optimizer.step()
    for name in WEIGHTS:
        torch.testing.assert_close(log.told[0].dense[name], 0.125 * expected[name], rtol=1e-14, atol=0)


def test_noise_after_clipping_is_in_the_kept_gradient_only() -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=2)
    for step in range(4):
        expected = plain_gradients(model, lambda m, step=step: loss_of(m, step, F64))
        optimizer.zero_grad()
        loss_of(model, step, F64).backward()
        for p in model.parameters():
            p.grad.add_(0.5)
        optimizer.step()
        for name in WEIGHTS:
            kept = checkered(expected[name].shape)
            assert same(log.told[-1].gradients[name], ((expected[name] + 0.5) * kept))
            if step % 2:
                assert same(log.told[-1].dense[name][kept], (expected[name] + 0.5)[kept])
        assert not nonzeros(s)


EVENTS = st.sampled_from(["backward", "backward", "backward", "to none", "to zero", "scale", "clip", "step", "step"])


@hypothesis.settings(max_examples=80)
@hypothesis.given(st.lists(EVENTS, min_size=4, max_size=24), st.integers(1, 3))
def test_any_order_of_events(events: list[str], dense: int) -> None:
    """Against a plain twin whose gradient is never cleared: what is told is its gradient, and its masked part."""
    model, twin = net(F64), net(F64)
    optimizer = sgd(model, momentum=0.0)
    s, log = recorded(model, optimizer, dense=dense)
    twin.load_state_dict(model.state_dict())
    passed = False
    for number, event in enumerate(events):
        if event == "backward":
            for m in (model, twin):
                loss_of(m, number, F64).backward()
            passed = True
        elif event.startswith("to "):
            for m in (model, twin):
                m.zero_grad(set_to_none=event == "to none")
        elif event == "step":
            told = len(log.told)
            optimizer.step()
            assert len(log.told) == told + 1
            for name in WEIGHTS if passed else ():
                compare(log.told[-1], name, twin.get_parameter(name).grad)
            assert not nonzeros(s)
            for m in (model, twin):
                m.zero_grad()
            twin.load_state_dict(model.state_dict())
        elif model[0].weight.grad is not None:
            scale(event, model, twin)
    assert log.moved == list(range(1, events.count("step") + 1))


def scale(event: str, model: nn.Module, twin: nn.Module) -> None:
    """Clip or halve the gradients, and the twin's by the same factor."""
    whole = plain_of(twin)
    if event == "clip":
        norm = total_norm(masked(whole))
        assert torch.allclose(clip_grad_norm_(model.parameters(), 0.3), norm, rtol=1e-9, atol=1e-15)
        factor = torch.clamp(0.3 / (norm + 1e-6), max=1.0)
    else:
        factor = torch.tensor(0.5, dtype=F64)
        for p in model.parameters():
            p.grad.mul_(0.5)
    for g in whole.values():
        g.mul_(factor)


def compare(told: Told, name: str, expected: Tensor | None) -> None:
    """Zeros stand for no gradient. Where the kept part is zero the dense one cannot tell by how much it was scaled."""
    kept = checkered(model_shape(name))
    whole = torch.zeros(model_shape(name), dtype=F64) if expected is None else expected
    assert torch.allclose(told.gradients.get(name, torch.zeros_like(whole)), whole * kept, rtol=1e-9, atol=1e-14)
    if told.dense:
        assert torch.allclose(told.dense[name], whole, rtol=1e-9, atol=1e-14)


def model_shape(name: str) -> tuple[int, int]:
    return {"0.weight": (8, 6), "2.weight": (4, 8)}[name]
