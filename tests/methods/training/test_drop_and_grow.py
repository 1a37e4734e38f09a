import pytest
import torch

import rarefy
import tiny
from rarefy import Every
from rarefy.methods import DropAndGrow


def test_it_is_a_method_of_its_own_but_in_no_list():
    assert "DropAndGrow" not in rarefy.all_methods()
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    method = DropAndGrow(0.8, grow="random", every=Every(2, 1.0))
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=8)
    tiny.fit(model, optimizer, 8, data, lambda _: rarefy.check(model, s))
    assert rarefy.method_from_dict(method.to_dict()) == method


@pytest.mark.parametrize("skip_step", [True, False])
def test_the_dense_gradient_is_announced_for_the_step_that_needs_it(skip_step: bool):
    method = DropAndGrow(0.8, every=Every(4, 0.75), skip_step=skip_step)
    wanted = [t for t in range(16) if method.wants_dense_gradient(t, 16)]
    assert wanted == ([4, 8] if skip_step else [3, 7])


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "constant_fan_in", "channel"])
def test_every_pattern_keeps_its_counts_and_moves(pattern: str):
    """With gradients that grow from step to step at other places: masks must move, by whole units."""
    model = tiny.linear(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).tolist())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = DropAndGrow(0.5, pattern=pattern, every=Every(1, 1.0), fraction=0.5)
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=20)
    kept, first = int(s.masks["weight"].sum()), s.masks["weight"]
    g = torch.Generator().manual_seed(1)
    for _ in range(10):
        tiny.step_with_gradient(optimizer, torch.randn(8, 12, generator=g, dtype=torch.float64))
        rarefy.check(model, s)
        assert int(s.masks["weight"].sum()) == kept
    assert not torch.equal(s.masks["weight"], first)


def test_rows_exchange_within_themselves_under_constant_fan_in():
    model = tiny.linear([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = DropAndGrow(0.5, pattern="constant_fan_in", every=Every(1, 1.0), fraction=0.5)
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=20)
    tiny.hold(s, [tiny.mask([[1, 1, 0, 0], [0, 0, 1, 1]])], [[[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 3.0]]])
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    tiny.step_with_gradient(optimizer, nothing)
    # Both 1s are dropped; row 0 grows where its gradient is largest, though row 1 has larger ones.
    tiny.step_with_gradient(optimizer, torch.tensor([[0.0, 0.0, 0.0, 1.0], [5.0, 9.0, 0.0, 0.0]], dtype=torch.float64))
    assert torch.equal(s.masks["weight"], tiny.mask([[1, 0, 0, 1], [0, 1, 0, 1]]))
