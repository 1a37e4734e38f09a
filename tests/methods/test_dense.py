import torch

import rarefy
import tiny


def test_it_changes_nothing():
    """A run under the handle is the run without it, to the bit."""
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, rarefy.Dense(), optimizer=optimizer)
    tiny.fit(model, optimizer, 6, data)
    plain = tiny.mlp()
    tiny.fit(plain, tiny.sgd(plain), 6, data)
    assert tiny.equal_models(model, plain)
    assert s.sparsity == 0.0
    assert all(bool(m.all()) for m in s.masks.values())
    assert torch.equal(s.masks["0.weight"], torch.ones(12, 10, dtype=torch.bool))
