import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rarefy.bench.cpu.cases import Zeros
from rarefy.bench.cpu.context import open_context
from rarefy.bench.cpu.machine import Machine
from rarefy.bench.cpu.model_cases import ModelCase, Network, build, layers, model_cases, prune, stand_ins
from rarefy.bench.cpu.models import measure_model, relative_error
from rarefy.bench.cpu.networks import Bert, Llama, MobileNetV1, ResNet50
from rarefy.bench.cpu.networks.vision import fold
from rarefy.bench.cpu.peers.environments import Peers
from rarefy.bench.cpu.timing import Plan

KNOWN = {MobileNetV1: 4_231_976, ResNet50: 25_557_032, Bert: 109_482_240, Llama: 1_100_048_384}


def small_bert():
    return Bert(vocabulary=50, width=32, inner=64, depth=2, heads=4, positions=16)


def small_llama():
    return Llama(vocabulary=50, width=32, inner=48, depth=2, heads=4, shared=2, context=8)


def network(make, **more):
    tokens = lambda batch, source: torch.randint(0, 50, (batch, 8), generator=source)  # noqa: E731
    given = {"example": tokens, "sparse": lambda name, layer: name.startswith(("blocks.", "layers.")), "below": 50}
    return Network("small", make, batches=(1,), **{**given, **more})


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_parameters_are_as_many_as_everybody_counts(kind):
    with torch.device("meta"):
        assert sum(p.numel() for p in kind().parameters()) == KNOWN[kind]


def test_folding_batch_norms_changes_nothing_but_rounding():
    source = torch.Generator().manual_seed(0)
    model = MobileNetV1().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=source)
            module.running_var.uniform_(0.5, 2.0, generator=source)
    x = torch.randn(1, 3, 64, 64, generator=source)
    with torch.no_grad():
        before = model(x)
        after = fold(model)(x)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert relative_error(after, before) < 1e-4


def test_decoding_a_token_sees_the_cache_and_costs_the_same_each_time():
    model = build(network(small_llama), torch.Generator().manual_seed(0))
    token = torch.tensor([[3]])
    with torch.no_grad():
        first, second = model(token), model(token)
        assert torch.equal(first, second)
        model.layers[0].self_attn.values.fill_(1.0)
        assert not torch.equal(model(token), first)


def test_a_prompt_is_read_causally_with_rotary_positions():
    model = build(network(small_llama), torch.Generator().manual_seed(0))
    prompt = torch.arange(8)[None]
    with torch.no_grad():
        last = model(prompt)
        assert torch.allclose(model(prompt[:, :5]), _logits_at(model, prompt, 4), atol=1e-5)
        swapped = prompt[:, [1, 0, 2, 3, 4, 5, 6, 7]]
        assert not torch.allclose(model(swapped), last, atol=1e-6)


def _logits_at(model, prompt, place):
    """Logits at a place of a longer prompt, computed block by block: what comes later must not matter."""
    turn = (model.cos[: prompt.shape[1]], model.sin[: prompt.shape[1]])
    x = model.embed_tokens(prompt)
    for layer in model.layers:
        x = layer(x, turn)
    return model.lm_head(model.norm(x[:, place]))


def test_attention_is_softmax_of_scaled_products():
    model = build(network(small_bert), torch.Generator().manual_seed(0))
    attention = model.blocks[0].attention
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    q, k, v = (p(x).view(2, 5, 4, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    shares = torch.softmax(torch.einsum("nihd,njhd->nhij", q, k) / 8**0.5, -1)
    mixed = torch.einsum("nhij,njhd->nihd", shares, v).reshape(2, 5, 32)
    expected = F.layer_norm(x + attention.o_proj(mixed), (32,), eps=1e-12)
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=0)


def test_random_weights_are_the_same_every_time_and_finite_to_the_end():
    first, second = (build(network(small_bert), torch.Generator().manual_seed(0)) for _ in range(2))
    tokens = torch.arange(8)[None]
    assert torch.equal(first(tokens), second(tokens))
    assert bool(first(tokens).isfinite().all())


def test_only_the_sparse_layers_have_zeros():
    net = network(small_bert)
    model = build(net, torch.Generator().manual_seed(0))
    kept, weights = prune(model, net, Zeros("unstructured", 0.75), torch.Generator().manual_seed(1))
    sparse = [layer for name, layer in layers(model) if net.sparse(name, layer)]
    assert weights == sum(layer.weight.numel() for layer in sparse)
    assert kept == weights // 4 == sum(int((layer.weight != 0).sum()) for layer in sparse)
    assert bool((model.pooler.weight != 0).all())


def test_depthwise_convolutions_and_the_first_stay_dense():
    case = model_cases(quick=True, only=("mobilenet",), dtypes=("fp32",))[0]
    with torch.device("meta"):
        chosen = [layer for name, layer in layers(case.network.make()) if case.network.sparse(name, layer)]
    assert len(chosen) == 14  # 13 of 1×1, and the classifier
    assert all(isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1) for layer in chosen)


def test_stand_ins_make_the_same_shapes():
    net = network(small_bert)
    model = build(net, torch.Generator().manual_seed(0))
    tokens = torch.arange(8)[None]
    shape = model(tokens).shape
    empty = stand_ins(model, net)
    assert not [name for name, layer in layers(empty) if net.sparse(name, layer)]
    assert empty(tokens).shape == shape


def test_networks_by_the_beginning_of_their_names():
    assert {c.network.name for c in model_cases(only=("BERT", "mobile"))} == {"BERT-base", "MobileNet-v1"}
    assert {c.dtype for c in model_cases(only=("llama",))} == {"bf16", "int8"}
    assert "Llama 1.1 B decode" not in {c.network.name for c in model_cases(quick=True)}
    with pytest.raises(ValueError, match="MobileNet-v1"):
        model_cases(only=("vgg",))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_network_is_measured_without_any_peer(dtype):
    absent = Peers({}, dict.fromkeys(("onnxruntime", "onnx", "deepsparse"), "not installed"))
    machine = Machine(processors=[0], cache=1 << 20)
    case = ModelCase(network(small_bert), 1, dtype, (Zeros("unstructured", 0.75), Zeros("4x1", 0.75)))
    with open_context(1, Plan(rounds=2, sample=0.0, settle=0.0), machine, absent) as context:
        rows = list(measure_model(case, context))
    assert [row.pattern for row in rows] == ["unstructured", "4x1"]
    for row in rows:
        assert {"torch fp32", f"rarefy dense {dtype}", "rarefy", "without weights"} <= set(row.times)
        assert row.facts["error"] < {"fp32": 1e-4, "bf16": 0.05, "int8": 0.05}[dtype]
        assert row.nonzeros == row.facts["sparse weights"] // 4
        assert row.choice
