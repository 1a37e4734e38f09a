"""Gradients are final in `on_gradients`: accumulated, unscaled, clipped; a voided step is no step."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint

import rarefy
from rarefy import Every
from recorder import Told, checkered, data, loss_of, net, nonzeros, recorded, same

F64 = torch.float64
WEIGHTS = ["0.weight", "2.weight"]


def sgd(model: nn.Module, **arguments: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | arguments)


def plain_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """What torch alone gives for the weights as they are."""
    twin = copy.deepcopy(model)
    loss(twin).backward()
    return {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}


def masked(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g * checkered(g.shape) if n in WEIGHTS else g for n, g in gradients.items()}


def total_norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()


# -- accumulated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["none", "zero"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_micro_batches_sum_to_one_big_batch(parts: int, reset: str) -> None:
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=2)
    for step in range(6):
        whole = plain_gradients(model, lambda m, step=step: sum(loss_of(m, 10 * step + i, F64) for i in range(parts)))
        optimizer.zero_grad(set_to_none=reset == "none")
        for i in range(parts):
            loss_of(model, 10 * step + i, F64).backward()
            for name, expected in masked(plain_gradients_of(model)).items():
                assert same(model.get_parameter(name).grad, expected)  # clear after every micro-batch
        optimizer.step()
        for name in WEIGHTS:
            torch.testing.assert_close(log.told[-1].gradients[name], masked(whole)[name], rtol=1e-12, atol=1e-15)
            if step % 2:
                torch.testing.assert_close(log.told[-1].dense[name], whole[name], rtol=1e-12, atol=1e-15)


def plain_gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_single_backward_pass_gives_the_very_bits_of_torch() -> None:
    model = net()
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    for step in range(3):
        expected = plain_gradients(model, lambda m, step=step: loss_of(m, step))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        assert all(same(log.told[-1].dense[name] + 0.0, expected[name] + 0.0) for name in WEIGHTS)


@pytest.mark.parametrize("reset", ["none", "zero", "by hand", "scaled", "replaced", "model"])
def test_what_happens_to_the_gradient_between_two_backward_passes(reset: str) -> None:
    """A stale dense gradient must not leak; a scaled one goes in as scaled."""
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    weight = model[0].weight
    for step in range(3):
        first = plain_gradients(model, lambda m, step=step: loss_of(m, 100 + step, F64))["0.weight"]
        second = plain_gradients(model, lambda m, step=step: loss_of(m, step, F64))["0.weight"]
        optimizer.zero_grad()
        loss_of(model, 100 + step, F64).backward()
        share = 0.0
        if reset in {"none", "zero"}:
            optimizer.zero_grad(set_to_none=reset == "none")
        elif reset == "by hand":
            weight.grad = None
        elif reset == "model":
            model.zero_grad()
        elif reset == "scaled":
            share = 0.25
            weight.grad.mul_(0.25)
        else:
            weight.grad = torch.zeros_like(weight)
        loss_of(model, step, F64).backward()
        optimizer.step()
        expected = second + share * first
        torch.testing.assert_close(log.told[-1].dense["0.weight"], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(log.told[-1].gradients["0.weight"], expected * checkered((8, 6)))


def test_a_reset_with_an_equal_number_of_writes_does_not_leak() -> None:
    """Whatever the version counter of a new gradient tensor says, and wherever it lies."""
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    for step in range(20):
        expected = plain_gradients(model, lambda m, step=step: loss_of(m, step, F64))
        loss_of(model, 100 + step, F64).backward()
        for p in model.parameters():
            p.grad = None
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(step % 4):
            for p in model.parameters():
                p.grad.add_(0.0)
        loss_of(model, step, F64).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in WEIGHTS:
            torch.testing.assert_close(log.told[-1].dense[name], expected[name], rtol=1e-9, atol=1e-12)


# -- clipped -----------------------------------------------------------------------------------------------------------


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


# -- given by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "a backward pass"])
def test_gradients_that_are_assigned(before: str) -> None:
    """torch.autograd.grad runs no hook of the parameter's gradient."""
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=2)
    for step in range(6):
        optimizer.zero_grad()
        if before != "nothing":
            loss_of(model, 50 + step, F64).backward()
        found = torch.autograd.grad(loss_of(model, step, F64), list(model.parameters()))
        for p, g in zip(model.parameters(), found, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for name, expected in zip(WEIGHTS, (found[0], found[2]), strict=True):
            assert same(log.told[-1].gradients[name] + 0.0, expected * checkered(expected.shape) + 0.0)
            if step % 2:
                assert same(log.told[-1].dense[name] + 0.0, expected + 0.0)
        assert not nonzeros(s)


def test_asking_for_gradients_between_backward_and_step_changes_nothing() -> None:
    def run(asking: bool) -> tuple[nn.Module, Any]:
        model = net(F64)
        optimizer = sgd(model)
        _, log = recorded(model, optimizer, dense=1)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                loss_of(model, 10 * step + part, F64).backward()
                if asking:
                    torch.autograd.grad(loss_of(model, 7, F64), list(model.parameters()))
            norm = clip_grad_norm_(model.parameters(), 0.5)
            log.moved.append(float(norm))  # type: ignore[arg-type]
            optimizer.step()
        return model, log

    (one, quiet), (other, asked) = run(False), run(True)
    assert all(same(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert quiet.moved == asked.moved
    for a, b in zip(quiet.told, asked.told, strict=True):
        assert all(torch.allclose(a.dense[n], b.dense[n], rtol=1e-13, atol=0) for n in WEIGHTS)


def test_an_averaged_clear_gradient_takes_the_place_of_the_last_one() -> None:
    """As gradient surgery does: the mean of gradients that were cleared. The masked part is then the last one's."""
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=1)
    parts = []
    for part in range(2):
        optimizer.zero_grad()
        loss_of(model, part, F64).backward()
        parts.append([p.grad.clone() for p in model.parameters()])
    for p, a, b in zip(model.parameters(), *parts, strict=True):
        p.grad = (a + b) / 2
    optimizer.step()
    for name, a, b in zip(WEIGHTS, parts[0][::2], parts[1][::2], strict=True):
        kept = checkered(a.shape)
        assert same(log.told[0].dense[name][kept], ((a + b) / 2)[kept])
        assert bool(log.told[0].dense[name][~kept].any())
    assert not nonzeros(s)


# -- backward passes of every kind ------------------------------------------------------------------------------------


def test_two_backward_passes_through_one_graph() -> None:
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    expected = plain_gradients(model, lambda m: 2 * loss_of(m, 0, F64))
    loss = loss_of(model, 0, F64)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    for name in WEIGHTS:
        torch.testing.assert_close(log.told[0].dense[name], expected[name], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dense", [0, 1])
def test_a_gradient_penalty_by_create_graph(dense: int) -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=dense)
    inputs, targets = data(0, F64)

    def loss(m: nn.Module) -> Tensor:
        value = (m(inputs) - targets).square().mean()
        gradients = torch.autograd.grad(value, list(m.parameters()), create_graph=True)
        return value + sum(g.square().sum() for g in gradients)

    expected = plain_gradients(model, loss)
    loss(model).backward()
    optimizer.step()
    for name in WEIGHTS:
        assert same(log.told[0].gradients[name] + 0.0, masked(expected)[name] + 0.0)
        if dense:
            assert same(log.told[0].dense[name] + 0.0, expected[name] + 0.0)
    assert not nonzeros(s)


@pytest.mark.parametrize("dense", [0, 1])
def test_a_backward_pass_that_creates_a_graph(dense: int) -> None:
    """p.grad is then itself differentiable; the penalty counts kept weights."""
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=dense)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a reference cycle, as torch says
        for m in (model, twin):
            loss_of(m, 0, F64).backward(create_graph=True)
    penalty = {n: (g * checkered(g.shape) if n in WEIGHTS else g) for n, g in plain_of(twin).items()}
    sum(g.square().sum() for g in penalty.values()).backward()
    sum(p.grad.square().sum() for p in model.parameters()).backward()
    expected = {name: p.grad.detach() for name, p in twin.named_parameters()}
    optimizer.step()
    for name in WEIGHTS:
        kept = checkered(expected[name].shape)
        torch.testing.assert_close(log.told[0].gradients[name].detach(), expected[name] * kept, rtol=1e-9, atol=1e-12)
        if dense:
            torch.testing.assert_close(log.told[0].dense[name], expected[name], rtol=1e-9, atol=1e-12)
    assert not nonzeros(s)
    for p in (*model.parameters(), *twin.parameters()):
        p.grad = None  # breaks the cycle


def plain_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Twice(nn.Module):
    """One Linear used twice, each time inside a checkpoint."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer, self.head = nn.Linear(6, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if self.reentrant is None:
                x = torch.tanh(self.layer(x))
            else:
                x = checkpoint(lambda y: torch.tanh(self.layer(y)), x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_and_a_layer_used_twice(reentrant: bool | None) -> None:
    model = Twice(reentrant)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=2)
    inputs, targets = data(0, F64)
    inputs.requires_grad_(True)
    for step in range(4):
        twin = Twice(None)
        twin.load_state_dict(model.state_dict())
        expected = plain_gradients(twin, lambda m: (m(inputs) - targets).square().mean())
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        norm = clip_grad_norm_(model.parameters(), 1e9)
        kept = {n: g * checkered(g.shape) if g.ndim == 2 else g for n, g in expected.items()}
        torch.testing.assert_close(norm, total_norm(kept), rtol=1e-12, atol=0)
        optimizer.step()
        for name in ("layer.weight", "head.weight"):
            torch.testing.assert_close(log.told[-1].gradients[name], kept[name], rtol=1e-12, atol=1e-15)
            if step % 2:
                torch.testing.assert_close(log.told[-1].dense[name], expected[name], rtol=1e-12, atol=1e-15)
        assert not nonzeros(s)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_user(when: str) -> None:
    """One that comes first sees the whole gradient, one that comes later the kept part; both may write to it."""
    model = net(F64)
    optimizer = sgd(model)
    weight, seen = model[0].weight, []

    def hook(p: Tensor) -> None:
        seen.append(p.grad.clone())
        p.grad.mul_(2.0)

    if when == "before":
        weight.register_post_accumulate_grad_hook(hook)
    s, log = recorded(model, optimizer, dense=2)
    if when == "after":
        weight.register_post_accumulate_grad_hook(hook)
    for step in range(4):
        twin = net(F64)
        twin.load_state_dict(model.state_dict())
        expected = plain_gradients(twin, lambda m, step=step: loss_of(m, step, F64))["0.weight"]
        optimizer.zero_grad()
        loss_of(model, step, F64).backward()
        optimizer.step()
        clear = expected * checkered((8, 6)) if when == "after" and step % 2 == 0 else expected
        assert same(seen[-1] + 0.0, clear + 0.0)
        assert same(log.told[-1].gradients["0.weight"] + 0.0, 2 * expected * checkered((8, 6)) + 0.0)
        if step % 2:
            assert same(log.told[-1].dense["0.weight"] + 0.0, 2 * expected + 0.0)
        assert not nonzeros(s)


def test_a_backward_pass_that_raises_half_way() -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=1)
    bomb = [True]

    def explode(grad: Tensor) -> None:
        if bomb.pop():
            raise MemoryError("no room")

    handle = model[0].weight.register_hook(explode)
    with pytest.raises(MemoryError):
        loss_of(model, 5, F64).backward()
    handle.remove()
    expected = plain_gradients(model, lambda m: loss_of(m, 0, F64))
    optimizer.zero_grad()
    loss_of(model, 0, F64).backward()
    optimizer.step()
    for name in WEIGHTS:
        assert same(log.told[0].dense[name] + 0.0, expected[name] + 0.0)
    assert not nonzeros(s)


def test_a_layer_that_is_not_used_has_no_gradient() -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=1)
    before = model[2].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        model[0](data(step, F64)[0]).square().mean().backward()
        optimizer.step()
        assert set(log.told[-1].gradients) == {"0.weight"}
        assert not log.told[-1].dense["2.weight"].any()
        assert not nonzeros(s)
    assert same(model[2].weight, before)


def test_a_layer_not_used_in_the_next_step_does_not_show_the_dense_gradient_of_the_last() -> None:
    model = net(F64)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    _, log = recorded(model, optimizer, dense=1)
    scaler.scale(loss_of(model, 0, F64)).backward()
    model[0].bias.grad[0] = float("inf")  # void
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(model[0](data(1, F64)[0]).square().mean()).backward()
    scaler.step(optimizer)
    assert not log.told[0].dense["2.weight"].any()


def test_frozen_layers_keep_their_weights() -> None:
    model = net(F64)
    model[2].requires_grad_(False)
    optimizer = sgd(model, weight_decay=0.1)
    s, log = recorded(model, optimizer, dense=2)
    before = model[2].weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step, F64).backward()
        optimizer.step()
        assert not nonzeros(s)
    assert same(model[2].weight, before)
    assert log.steps == [0, 1, 2, 3]


def test_bfloat16_autocast() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    s, log = recorded(model, optimizer, dense=2)

    def loss(m: nn.Module, step: int) -> Tensor:
        inputs, targets = data(step)
        with torch.autocast("cpu", torch.bfloat16):
            output = m(inputs)
        return (output.float() - targets).square().mean()

    for step in range(6):
        expected = plain_gradients(model, lambda m, step=step: loss(m, step))
        optimizer.zero_grad()
        loss(model, step).backward()
        norm = clip_grad_norm_(model.parameters(), 1e9)
        torch.testing.assert_close(norm.double(), total_norm(masked(expected)), rtol=1e-5, atol=0)
        optimizer.step()
        for name in WEIGHTS:
            assert same(log.told[-1].gradients[name] + 0.0, masked(expected)[name] + 0.0)
            if step % 2:
                assert same(log.told[-1].dense[name] + 0.0, expected[name] + 0.0)
        assert not nonzeros(s)


# -- not finite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["kept", "masked"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [False, True])
def test_a_bad_gradient_at_an_update_step_raises_and_changes_nothing(clip: bool, bad: float, at: str) -> None:
    model = net(F64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    method = rarefy.RigL(0.6, allocation="uniform", every=Every(3, 1.0))
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=20)
    poison: list[float] = []

    def spoil(grad: Tensor) -> Tensor:
        if not poison:
            return grad
        mask = s.masks["0.weight"]
        place = (mask if at == "kept" else ~mask).nonzero()[0]
        return grad.index_put(tuple(place), torch.tensor(poison.pop(), dtype=F64))

    model[0].weight.register_hook(spoil)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, F64).backward()
        optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    masks, saved = s.masks, s.generator.get_state()
    poison.append(bad)
    optimizer.zero_grad()
    loss_of(model, 3, F64).backward()
    if clip:
        clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        optimizer.step()
    assert all(same(value, model.state_dict()[name]) for name, value in weights.items())
    assert all(torch.equal(masks[name], s.masks[name]) for name in masks)
    assert s.step == 3
    assert torch.equal(saved, s.generator.get_state())
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(same(value, state["state"][index][name]) for name, value in entries.items())
    # The loop may go on with the next batch, and the update takes place then.
    optimizer.zero_grad()
    loss_of(model, 4, F64).backward()
    optimizer.step()
    assert s.step == 4
    assert any(not torch.equal(masks[name], s.masks[name]) for name in masks)
    assert not nonzeros(s)


def test_a_bad_gradient_at_a_masked_position_of_an_ordinary_step_is_cleared() -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=2)
    expected = plain_gradients(model, lambda m: loss_of(m, 0, F64))
    model[0].weight.register_hook(lambda grad: grad.masked_fill(~checkered((8, 6)), float("nan")))
    loss_of(model, 0, F64).backward()
    norm = clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, total_norm(masked(expected)), rtol=1e-12, atol=0)
    optimizer.step()
    assert log.moved == [1]
    assert not nonzeros(s)


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rarefy.sparsify(model, rarefy.Random(0.5), optimizer=optimizer, only=[nn.Embedding, nn.Linear])
    with pytest.raises(ValueError, match=r"'0\.weight' is sparse.*sparse=False"):
        model(torch.arange(5)).sum().backward()
