import math

import torch

import rarefy
import tiny
from rarefy import Constant, Cosine, Every, RigL

MASK = tiny.mask([[1, 1, 0, 0], [0, 1, 1, 0]])
WEIGHT = torch.tensor([[0.5, -0.1, 0.0, 0.0], [0.0, 0.2, -0.8, 0.0]], dtype=torch.float64)
GRADIENT = torch.tensor([[0.1, 0.3, -0.9, 0.05], [0.7, 0.0, 0.2, -0.4]], dtype=torch.float64)


def held(method, optimizer=torch.optim.SGD, lr=0.0, steps=100, **options):
    """A 4→2 layer under the mask and the weights above, one step before the first update."""
    model = tiny.linear(WEIGHT.tolist())
    opt = optimizer(model.parameters(), lr=lr, **options)
    s = rarefy.sparsify(model, method, optimizer=opt, steps=steps)
    tiny.hold(s, [MASK], [WEIGHT])
    tiny.step_with_gradient(opt, torch.zeros(2, 4, dtype=torch.float64))
    return model, opt, s


HALF = RigL(sparsity=0.5, every=Every(1, 0.75), fraction=Constant(0.5))


def test_the_weakest_half_goes_and_the_strongest_gradients_come():
    # |w| of the kept: .5 .1 .2 .8, so .5 and .8 stay; |g| of all others: .3 .9 .05 .7 0 .4, so .9 and .7 grow.
    model, opt, s = held(HALF)
    tiny.step_with_gradient(opt, GRADIENT)
    assert torch.equal(s.masks["weight"], tiny.mask([[1, 0, 1, 0], [1, 0, 1, 0]]))
    assert torch.equal(model.weight, torch.tensor([[0.5, 0, 0, 0], [0, 0, -0.8, 0]], dtype=torch.float64))
    assert tiny.positive_zero(model.weight[[0, 1], [2, 0]])  # the new ones start at zero


def test_weight_decay_does_not_enter_the_grow_score():
    _, opt, s = held(HALF, weight_decay=100.0)
    tiny.step_with_gradient(opt, GRADIENT)
    assert torch.equal(s.masks["weight"], tiny.mask([[1, 0, 1, 0], [1, 0, 1, 0]]))


def test_what_is_dropped_and_regrown_at_once_keeps_its_weight_and_its_state():
    model, opt, s = held(HALF, lr=1e-12, momentum=0.9)
    tiny.step_with_gradient(opt, GRADIENT)  # an update; then a step that fills the momentum, then another update
    tiny.hold(s, [MASK], [WEIGHT])
    opt.state[model.weight]["momentum_buffer"].copy_(torch.arange(8.0).reshape(2, 4)).masked_fill_(~MASK, 0)
    gradient = GRADIENT.clone()
    gradient[0, 1], gradient[1, 1] = 5.0, 4.0  # the two that are dropped
    tiny.step_with_gradient(opt, gradient)
    assert torch.equal(s.masks["weight"], MASK)
    assert torch.equal(model.weight, WEIGHT)
    assert torch.equal(opt.state[model.weight]["momentum_buffer"], torch.tensor([[0, 1, 0, 0], [0, 5, 6, 0]]).double())


def test_a_new_weight_starts_without_momentum_and_the_step_is_skipped():
    model, opt, _ = held(HALF, lr=0.1, momentum=0.9)
    opt.state[model.weight]["momentum_buffer"].copy_(torch.arange(8.0).reshape(2, 4)).masked_fill_(~MASK, 0)
    tiny.step_with_gradient(opt, GRADIENT)
    assert torch.equal(model.weight[0, 0], WEIGHT[0, 0])  # no step: neither gradient nor momentum moved it
    # kept (0,0) and (1,2) keep theirs (0 and 6), all others are at zero
    assert torch.equal(opt.state[model.weight]["momentum_buffer"], torch.tensor([[0, 0, 0, 0], [0, 0, 6, 0]]).double())


def test_a_fraction_of_zero_moves_nothing():
    model, opt, s = held(RigL(sparsity=0.5, every=Every(1, 0.75), fraction=0.0))
    tiny.step_with_gradient(opt, GRADIENT)
    assert torch.equal(s.masks["weight"], MASK)
    assert torch.equal(model.weight, WEIGHT)


def test_ties_go_to_the_lower_index():
    # No gradient anywhere: the dropped weak ones are (0,1), (1,1); of equal scores the first two free places grow.
    _, opt, s = held(HALF)
    tiny.step_with_gradient(opt, torch.zeros_like(GRADIENT))
    assert torch.equal(s.masks["weight"], tiny.mask([[1, 1, 1, 0], [0, 0, 1, 0]]))


def reference(weight: list[float], gradient: list[float], kept: set[int], alpha: float) -> set[int]:
    """RigL's update of one layer, in words: sets and sorting."""
    k = int(alpha * len(kept))
    stay = sorted(kept, key=lambda i: (-abs(weight[i]), i))[: len(kept) - k]
    others = [i for i in range(len(weight)) if i not in stay]
    return {*stay, *sorted(others, key=lambda i: (-abs(gradient[i]), i))[:k]}


def test_a_run_follows_the_paper():
    """Every update of a run against the reference: masks, annealing, when and until when."""
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    method = RigL(sparsity=0.7, every=Every(5, 0.75), fraction=Cosine(0.4))
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=40)
    updates = []
    for t in range(40):
        masks, weights = s.masks, {site.name: site.parameter.detach().clone() for site in s.sites}
        optimizer.zero_grad()
        tiny.loss(model, data[t % 3]).backward()
        dense = tiny.clone(model)  # the dense gradient is that of a network which happens to hold zeros
        dense.zero_grad()
        tiny.loss(dense, data[t % 3]).backward()
        optimizer.step()
        if any(not torch.equal(masks[n], m) for n, m in s.masks.items()):
            updates.append(t)
        for name, before in masks.items():
            expected = before
            if t in {5, 10, 15, 20, 25}:
                alpha = 0.4 / 2 * (1 + math.cos(math.pi * t / 30))
                kept = set(before.flatten().nonzero().flatten().tolist())
                gradient = dense.get_parameter(name).grad.flatten().tolist()
                now = reference(weights[name].flatten().tolist(), gradient, kept, alpha)
                expected = torch.tensor([i in now for i in range(before.numel())]).view_as(before)
                stayed = before & expected
                assert torch.equal(model.get_parameter(name)[stayed], weights[name][stayed])
                assert tiny.positive_zero(model.get_parameter(name)[~stayed])
            assert torch.equal(s.masks[name], expected), (t, name)
    assert updates
    assert updates[-1] < 30
    assert s.ledger.dense_steps == [5, 10, 15, 20, 25]


def test_defaults_are_the_papers():
    method = RigL(sparsity=0.9)
    assert (method.every, method.fraction) == (Every(100, 0.75), Cosine(0.3))
    assert method.skip_step
    assert str(method) == "RigL(sparsity=0.9)"
