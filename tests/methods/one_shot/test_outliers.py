"""The rescale that makes outlier features and leaves the model's function as it is: who notices, and who does not.

A few gains of a norm are multiplied by a, and the columns of the Linear layers that read it divided by a. With a power
of two every product, hence everything that a forward pass computes, is the same to the last bit.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import rarefy
from architectures import build
from rarefy.core.capture import default_sites
from rarefy.core.sites import find_sites

FEATURES = [3, 11]
READERS = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}


def llama(factor: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Any, list[dict[str, Tensor]]]:
    model, data = build("Llama")
    model.to(dtype)
    with torch.no_grad():
        for block in model.model.layers:
            for norm, layers in READERS.items():
                block.get_submodule(norm).weight[FEATURES] *= factor
                for layer in layers:
                    block.get_submodule(layer).weight[:, FEATURES] /= factor
    return model, data


def logits(model: Any, data: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in data])


def pruned(method: Any, factor: float, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """Masks, and what the pruned model computes."""
    model, data = llama(factor, dtype)
    names = [site.name for site in default_sites(model, find_sites(model))]
    masks = rarefy.sparsify(model, method, data=data, only=names).masks
    return masks, logits(model, data)


def reads_outliers(name: str) -> bool:
    return any(layer in name for layers in READERS.values() for layer in layers)


def test_the_function_stays():
    model, data = llama()
    assert torch.equal(logits(model, data), logits(*llama(32.0)))
    torch.testing.assert_close(logits(*llama(30.0)), logits(model, data), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        rarefy.Wanda(0.5),
        rarefy.Wanda(0.6, group="layer"),
        rarefy.Wanda(pattern="2:4"),
        rarefy.Wanda(0.5, allocation=rarefy.OWL(outlier=2.0)),
        rarefy.Refit(rarefy.Wanda(0.5), damping=0.0),
    ],
    ids=str,
)
def test_wanda_chooses_exactly_the_same(method: rarefy.Method):
    masks, found = pruned(method, 1.0)
    rescaled, same = pruned(method, 32.0)
    assert all(torch.equal(masks[name], rescaled[name]) for name in masks)
    if isinstance(method, rarefy.Wanda):
        assert torch.equal(found, same)
    else:
        torch.testing.assert_close(found, same, rtol=1e-3, atol=1e-4)
    rescaled, same = pruned(method, 30.0)  # here rounding differs, and is far smaller than what scores differ by
    assert all(torch.equal(masks[name], rescaled[name]) for name in masks)
    torch.testing.assert_close(found, same, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "method", [rarefy.SparseGPT(0.5, damping=0.0), rarefy.SparseGPT(pattern="2:4", damping=0.0)], ids=str
)
def test_sparse_gpt_does_so_without_damping(method: rarefy.Method):
    masks, found = pruned(method, 1.0, torch.float64)
    rescaled, same = pruned(method, 32.0, torch.float64)
    assert all(torch.equal(masks[name], rescaled[name]) for name in masks)
    torch.testing.assert_close(found, same, rtol=1e-6, atol=1e-9)


def test_magnitude_drops_what_outliers_meet_and_computes_something_else():
    model, data = llama()
    dense = logits(model, data)
    errors: list[float] = []
    for factor in (1.0, 30.0):
        masks, found = pruned(rarefy.Magnitude(0.5, allocation="uniform"), factor)
        errors.append(float((found - dense).square().sum()))
        for name, mask in masks.items():
            assert int(mask.sum()) == mask.numel() // 2
            if reads_outliers(name):
                assert bool(mask[:, FEATURES].any()) == (factor == 1.0)
    assert errors[1] > 1.5 * errors[0]
    wanda = [float((pruned(rarefy.Wanda(0.5), factor)[1] - dense).square().sum()) for factor in (1.0, 30.0)]
    assert wanda[1] == pytest.approx(wanda[0], rel=1e-3)
    assert wanda[1] < errors[1]
