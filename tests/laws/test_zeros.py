"""Law 3: after every optimizer step masked weights are +0.0 to the bit, with every optimizer, whatever came before."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizer_list
import rarefy
from laws.zeros import METHODS, train
from recorder import Mover, checkered, data, loss_of, net, nonzeros, recorded, same

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", optimizer_list.IMPLEMENTATIONS)
def test_masked_weights_are_zero_after_every_step(name: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizers = optimizer_list.IMPLEMENTATIONS[name](model)
    s = rarefy.sparsify(model, METHODS["RigL"], optimizer=optimizers, steps=8)
    train(model, optimizers, s, steps=8)
    rarefy.check(model, s)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in optimizer_list.DEFAULT if name != "Muon"])
def test_with_every_kind_of_method(name: str, method: str) -> None:
    model = net()
    optimizers = optimizer_list.DEFAULT[name](model)
    s = rarefy.sparsify(model, METHODS[method], optimizer=optimizers, steps=8)
    train(model, optimizers, s)
    rarefy.check(model, s)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", optimizer_list.IMPLEMENTATIONS)
def test_kept_weights_are_those_of_a_loop_that_masks_gradients_and_weights(name: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    literal = copy.deepcopy(model)
    masks = {n: checkered(p.shape) for n, p in literal.named_parameters() if p.ndim == 2}
    hold(literal, masks)
    optimizers, others = (optimizer_list.IMPLEMENTATIONS[name](m) for m in (model, literal))
    recorded(model, optimizers)
    for step in range(5):
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, dtype))
        optimizer_list.update(
            others, lambda step=step: loss_of(literal, step, dtype), lambda: hold(literal, masks, gradients=True)
        )
        hold(literal, masks)
        for p, q in zip(model.parameters(), literal.parameters(), strict=True):
            assert same(p, q)


def hold(model: nn.Module, masks: dict[str, Tensor], gradients: bool = False) -> None:
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in masks:
                tensor = p.grad if gradients else p
                assert tensor is not None
                tensor.masked_fill_(~masks[n], 0)


# -- where weights lie, and who holds them -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD momentum decay", "AdamW decay above 1", "Adafactor", "ASGD"])
@pytest.mark.parametrize("form", ["channels_last", "transposed", "expanded bias"])
def test_in_every_memory_order(name: str, form: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 9, 3))
    if form == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    elif form == "transposed":
        model[2].weight.data = model[2].weight.data.t().contiguous().t()
    optimizers = optimizer_list.DEFAULT[name](model)
    s, _ = recorded(model, optimizers)
    for step in range(4):
        inputs = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer_list.update(optimizers, lambda inputs=inputs: model(inputs).square().mean())
        assert not nonzeros(s)
        if step == 1 and form == "channels_last":
            model[0].weight.data = torch.randn(4, 3, 3, 3)  # now in another order than the mask


@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_cast_after_attaching(cast: torch.dtype) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    s, _ = recorded(model, optimizer, dense=2)
    model.to(cast)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step, cast).backward()
        optimizer.step()
        assert not nonzeros(s)


def test_followers_in_another_optimizer_than_their_layer() -> None:
    """Muon takes the matrices, AdamW the biases; AdamW steps last, or first."""
    for order in (0, 1):
        model = net()
        pair = optimizer_list.muon_and_adamw(model)
        s = rarefy.sparsify(model, rarefy.Magnitude(0.5, pattern="channel"), optimizer=pair)
        assert any(site.followers for site in s.sites)

        def fill(step: int, model: nn.Module = model) -> None:
            for p in model.parameters():
                p.data.add_(1.0)

        train(model, pair[::-1] if order else pair, s, steps=3, before=fill)


def test_a_layer_that_is_unfrozen_and_added_to_the_optimizer_later() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adafactor(model[2].parameters(), lr=0.1)
    s, log = recorded(model, optimizer)
    for step in range(6):
        if step == 3:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters())})
        optimizer.zero_grad()
        loss_of(model, step).backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        kept = [p.grad[checkered(p.shape)] if p.ndim == 2 else p.grad for p in model.parameters() if p.grad is not None]
        assert torch.allclose(total, torch.cat([g.flatten() for g in kept]).norm())
        optimizer.step()
        assert not nonzeros(s)
    assert [len(told.ready) for told in log.told] == [1, 1, 1, 2, 2, 2]


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=3.0)
    s, _ = recorded(model, optimizer, dense=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(10)).square().mean().backward()
        optimizer.step()
        assert not nonzeros(s)


def test_a_wrapper_that_holds_the_optimizer() -> None:
    model = net()
    wrapper: Any = optimizer_list.Wrapped(torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=3.0))
    s, log = recorded(model, wrapper)
    train(model, [wrapper], s)
    assert log.moved == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where it compiles optimizers
def test_a_compiled_optimizer_step() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), weight_decay=3.0)
    s = rarefy.sparsify(model, Mover(at=2), optimizer=optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(4):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        step()
        assert not nonzeros(s)
    assert s.step == 4


def test_a_compiled_model_sees_dense_gradients_and_is_compiled_once() -> None:
    model, graphs = net(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    s, log = recorded(model, optimizer, dense=2)
    for step in range(6):
        inputs, targets = data(step)
        optimizer.zero_grad()
        plain = torch.autograd.grad((model(inputs) - targets).square().mean(), [site.parameter for site in s.sites])
        (compiled(inputs) - targets).square().mean().backward()
        optimizer.step()
        assert not nonzeros(s)
        for site, expected in zip(s.sites, plain, strict=True):
            if step % 2:
                assert torch.allclose(log.told[-1].dense[site.name], expected, rtol=1e-5, atol=1e-7)
    assert len(graphs) == 1
