import pytest
import torch

import rarefy
import tiny
from rarefy import TopKAST

# |θ|: A = {5, −4} (D = .25), B adds {3, −2} (D + M = .5)
THETA = [[1.0, 5.0, -2.0, 0.5, -4.0, 3.0, 0.1, -0.2]]
A = [[0, 1, 0, 0, 1, 0, 0, 0]]
B = [[0, 1, 1, 0, 1, 1, 0, 0]]
METHOD = TopKAST(sparsity=0.75, density_backward=0.5, every=100, penalty=0.0)


def start(method: rarefy.Method = METHOD, steps: int = 1000, **options):
    model = tiny.linear(THETA)
    optimizer = torch.optim.SGD(model.parameters(), **({"lr": 0.1} | options))
    return model, optimizer, rarefy.sparsify(model, method, optimizer=optimizer, steps=steps)


def test_the_two_sets():
    model, _, s = start()
    site = s.sites[0]
    assert torch.equal(site.mask, tiny.mask(A))
    assert torch.equal(site.trainable, tiny.mask(B))
    assert model.weight.tolist() == [[0.0, 5.0, 0.0, 0.0, -4.0, 0.0, 0.0, 0.0]]
    assert site.master.tolist() == THETA


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_outside_b_nothing_moves(optimizer: type[torch.optim.Optimizer]):
    """Neither gradient, nor weight decay, nor momentum, for many steps."""
    model = tiny.linear(THETA)
    options = {"momentum": 0.9} if optimizer is not torch.optim.AdamW else {}
    opt = optimizer(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    s = rarefy.sparsify(model, TopKAST(0.75, penalty=0.01), optimizer=opt, steps=1000)
    for _ in range(7):
        tiny.step_with_gradient(opt, torch.ones(1, 8, dtype=torch.float64))
    theta, before = s.sites[0].master, torch.tensor(THETA, dtype=torch.float64)
    outside = ~tiny.mask(B)
    assert tiny.bits(theta[outside]) == tiny.bits(before[outside])
    assert (theta[~outside] != before[~outside]).all()
    assert torch.equal(model.weight, theta.masked_fill(~tiny.mask(A), 0))


def test_b_gets_the_dense_gradient_of_the_sparse_forward():
    model, data = tiny.mlp(), tiny.batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    s = rarefy.sparsify(model, TopKAST(0.8, 0.6, penalty=0.0), optimizer=optimizer, steps=1000)
    before = [site.master.clone() for site in s.sites]
    sparse = tiny.clone(model)  # a network that happens to hold these zeros
    tiny.fit(model, optimizer, 1, data)
    tiny.loss(sparse, data[0]).backward()
    for site, theta in zip(s.sites, before, strict=True):
        gradient = sparse.get_parameter(site.name).grad
        assert torch.allclose(theta - site.master, 0.1 * gradient * site.trainable, atol=1e-15)
        assert (gradient[site.trainable & ~site.mask] != 0).any()


def test_the_forward_pass_knows_a_only():
    model, _, s = start()
    x = torch.ones(1, 8, dtype=torch.float64)
    before = model(x)
    s.sites[0].master[~tiny.mask(A)] += 100.0
    assert torch.equal(model(x), before)


def test_the_gradient_of_the_penalty():
    """½‖θ_A‖² + ½‖θ_{B∖A}‖²/D: θ on A, θ/D on B∖A, nothing elsewhere; D = ¼."""
    _, optimizer, s = start(TopKAST(0.75, 0.5, penalty=0.01), lr=1.0)
    tiny.step_with_gradient(optimizer, torch.zeros(1, 8, dtype=torch.float64))
    pull = torch.tensor(THETA, dtype=torch.float64) - s.sites[0].master
    expected = torch.tensor([[0.0, 5.0, -8.0, 0.0, -4.0, 12.0, 0.0, 0.0]], dtype=torch.float64) * 0.01
    assert torch.allclose(pull, expected, atol=1e-15)


def test_both_sets_are_chosen_anew():
    model, optimizer, s = start(TopKAST(0.75, 0.5, every=2, penalty=0.0), lr=1.0)
    # In two steps 3 (in B) grows to 7 and 5 falls to 3: A = {7, −4}, B adds {3, −2}.
    gradient = torch.tensor([[9.0, 1.0, 0.0, 9.0, 0.0, -2.0, 9.0, 9.0]], dtype=torch.float64)
    tiny.step_with_gradient(optimizer, gradient)
    assert torch.equal(s.masks["weight"], tiny.mask(A))
    tiny.step_with_gradient(optimizer, gradient)
    assert torch.equal(s.masks["weight"], tiny.mask([[0, 0, 0, 0, 1, 1, 0, 0]]))
    assert torch.equal(s.sites[0].trainable, tiny.mask(B))
    assert model.weight.tolist() == [[0.0, 0.0, 0.0, 0.0, -4.0, 7.0, 0.0, 0.0]]


def test_exploration_may_stop():
    _, optimizer, s = start(TopKAST(0.75, 0.5, every=2, until=0.5), steps=10)
    nothing = torch.zeros(1, 8, dtype=torch.float64)
    widths = []
    for _ in range(10):
        tiny.step_with_gradient(optimizer, nothing)
        widths.append(int(s.sites[0].trainable.sum()))
    assert widths == [4] * 4 + [2] * 6


def test_both_shares_are_exact():
    """|A| = ⌊.1·n + ½⌋, |B| = ⌊.35·n + ½⌋ of every layer, A ⊆ B."""
    model = tiny.mlp()
    s = rarefy.sparsify(model, TopKAST(0.9, 0.35))
    assert [int(site.mask.sum()) for site in s.sites] == [12, 10, 3]
    assert [int(site.trainable.sum()) for site in s.sites] == [42, 34, 11]
    assert not any(bool((site.mask & ~site.trainable).any()) for site in s.sites)


def test_the_backward_share_must_hold_the_forward_one():
    with pytest.raises(ValueError, match="B must contain A"):
        TopKAST(0.4, density_backward=0.5)
    assert TopKAST(0.7, density_backward=0.3)  # 1 − .7 is .3 as written, if not as a binary number


def test_an_empty_layer_has_a_penalty_too():
    model = tiny.linear([[1.0, 2.0, 3.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    s = rarefy.sparsify(model, TopKAST(0.9, 0.5, penalty=0.01), optimizer=optimizer, steps=100)
    assert int(s.masks["weight"].sum()) == 0
    tiny.step_with_gradient(optimizer, torch.zeros(1, 3, dtype=torch.float64))
    rarefy.check(model, s)


def test_its_cost():
    """Forward and gradient of the input at density D, gradient of the weight at D + M."""
    _, optimizer, s = start()
    tiny.step_with_gradient(optimizer, torch.zeros(1, 8, dtype=torch.float64))
    assert s.ledger.training_flops({"weight": 16.0}) == 16 * (0.25 + 0.25 + 0.5)
