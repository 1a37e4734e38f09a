import gc
import itertools
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, build
from core.capture.references import close, hooked, shrink
from rarefy.core.capture import blocks_of, collect, default_sites, dense_statistics, walk
from rarefy.core.sites import find_sites

FAST = {"Llama", "GPT2", "Gemma3", "Mixtral", "T5", "ViT", "Whisper", "Mamba", "ResNet"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ARCHITECTURES])
def test_inputs_are_those_of_a_whole_run_of_the_model_changed_so_far(name: str):
    model, data = build(name)
    sites = find_sites(model)
    inside = default_sites(model, sites)
    met: list[Any] = []
    for captured in walk(model, sites, data, gram=torch.float64):
        met += captured.block.sites
        known = hooked(model, data, list(captured.block.sites))
        assert set(captured.statistics) == set(captured.block.sites)
        for site, expected in known.items():
            parts = captured.statistics[site]
            assert len(parts) == len(expected)
            for part, x in zip(parts, expected, strict=True):
                assert part.tokens == len(x)
                assert close(part.squares, x.square().sum(0))
                assert torch.allclose(part.sums, x.sum(0), rtol=1e-12, atol=1e-10)
                assert part.gram is not None
                assert close(part.gram, x.T @ x)
                assert torch.equal(part.gram, part.gram.T)
        # Replayed wherever there is a chain: none of these needs the model's whole run for every block.
        assert bool(captured.fallback) == (
            not set(captured.block.sites) & set(inside) and "classifier.1" not in captured.block.name
        )
        shrink(captured)
    assert sorted(s.name for s in met) == sorted(s.name for s in sites)


@pytest.mark.parametrize("name", ["Llama", "T5", "ResNet", "Mixtral"])
def test_a_walk_without_changes_leaves_the_model_as_it_was(name: str):
    model, data = build(name)
    model.train()
    model.get_submodule(next(n for n, _ in model.named_modules() if n.count(".") == 1)).eval()
    next(model.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    cache = getattr(model.config, "use_cache", None)
    random = torch.get_rng_state()

    def unchanged() -> bool:
        return (
            all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            and modes == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
            and flags == [p.requires_grad for p in model.parameters()]
            and getattr(model.config, "use_cache", None) == cache
            and torch.equal(torch.get_rng_state(), random)
            and torch.backends.mha.get_fastpath_enabled()
        )

    for _ in walk(model, find_sites(model), data, gram=torch.float32):
        assert unchanged()  # at every block, so that the caller finds the model as it was
    assert unchanged()
    model.register_buffer("unused", torch.zeros(1))
    with pytest.raises(ValueError, match="boom"):
        fail(model, data)
    model.__delattr__("unused")
    assert unchanged()


def fail(model: nn.Module, data: list[Any]) -> None:
    """An exception in the middle of a run."""
    calls = itertools.count()

    def boom(*_: Any) -> None:
        if next(calls) >= 4:
            raise ValueError("boom")

    with_hook = next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    hook = with_hook.register_forward_hook(boom)
    try:
        list(walk(model, find_sites(model), data))
    finally:
        hook.remove()


def kept(model: nn.Module, data: list[Any], **options: Any) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for captured in walk(model, default_sites(model, find_sites(model)), data, **options):
        for site, parts in captured.statistics.items():
            found[site.name] = [(p.tokens, p.sequences, p.squares, p.sums, p.within, p.gram) for p in parts]
        shrink(captured)
    return found


def same(a: dict[str, list[tuple[Any, ...]]], b: dict[str, list[tuple[Any, ...]]], relative: float) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return close(x, y.double(), relative) if isinstance(x, torch.Tensor) else x == y

    assert a.keys() == b.keys()
    return all(all(map(equal, p, q)) for k in a for p, q in zip(a[k], b[k], strict=True))


def test_spilled_activations_are_the_same_bits(tmp_path):
    plain = kept(*build("T5"), gram=torch.float32)
    spilled = kept(*build("T5"), gram=torch.float32, spill_above=0, folder=tmp_path)
    assert same(plain, spilled, 0.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_of_experts_inputs_are_kept_and_their_gram_matrices_have_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, data = build(name)
    for captured in walk(model, default_sites(model, find_sites(model)), data, gram=torch.float32):
        each = {id(part): part.outer for parts in captured.statistics.values() for part in parts}
        held = [outer.numel() for outer in each.values() if isinstance(outer, torch.Tensor)]
        widest = max(len(part.squares) for parts in captured.statistics.values() for part in parts)
        assert len(held) < len(each)
        assert sum(held) <= 1.5 * widest**2
    made = kept(*build(name), gram=torch.float32, spill_above=0, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(collect, "_HELD", math.inf)
    assert same(made, kept(*build(name), gram=torch.float32), 0.0)


def test_a_walk_given_up_leaves_no_files(tmp_path):
    model, data = build("Llama")
    walking = walk(model, default_sites(model, find_sites(model)), data, spill_above=0, folder=tmp_path)
    next(walking)
    assert list(tmp_path.iterdir())
    walking.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["Llama", "T5", "ViT", "ResNet"])
def test_batches_may_be_grouped_in_any_way(name: str):
    model, data = build(name)
    single = [{k: v[i : i + 1] for k, v in batch.items()} for batch in data for i in range(2)]
    together = [{k: torch.cat([b[k] for b in data]) for k in data[0]}]
    found = kept(model, data, gram=torch.float64)
    assert same(found, kept(build(name)[0], single, gram=torch.float64), 1e-5)
    assert same(found, kept(build(name)[0], together, gram=torch.float64), 1e-5)


def test_an_interrupted_walk_goes_on_at_its_block():
    model, data = build("Llama")
    sites = default_sites(model, find_sites(model))
    whole = kept(*build("Llama"))
    walking = walk(model, sites, data)
    first = next(walking)
    shrink(first)
    done = [first.block.name]
    walking.close()
    assert [c.block.name for c in walk(model, sites, data, done=done)] == ["model.layers.1", "model.layers.2"]
    rest: dict[str, Any] = {}
    for captured in walk(model, sites, data, done=done):
        for site, parts in captured.statistics.items():
            rest[site.name] = [(p.tokens, p.sequences, p.squares, p.sums, p.within, p.gram) for p in parts]
        shrink(captured)
    assert same(rest, {k: v for k, v in whole.items() if k in rest}, 0.0)


def test_what_reads_one_tensor_shares_its_statistics():
    model, data = build("Llama")
    first = next(walk(model, find_sites(model), data, gram=torch.float32))
    by_name = {site.name.split("layers.0.")[1]: parts[0] for site, parts in first.statistics.items()}
    q, k, v = (by_name[f"self_attn.{n}_proj.weight"] for n in "qkv")
    assert q is k is v
    assert by_name["mlp.gate_proj.weight"] is by_name["mlp.up_proj.weight"]
    assert len({id(part) for part in by_name.values()}) == 4


def test_statistics_of_a_block_are_freed_before_the_next():
    model, data = build("Llama")
    grams: list[weakref.ref[Any]] = []
    for captured in walk(model, find_sites(model), data, gram=torch.float32):
        assert all(ref() is None for ref in grams)
        grams += [weakref.ref(part.gram) for parts in captured.statistics.values() for part in parts]
        gc.collect()


def test_moments_of_the_whole_model_in_one_run():
    model, data = build("Llama")
    sites = find_sites(model)
    found = dense_statistics(model, sites, data)
    for site, x in hooked(model, data, sites).items():
        assert close(found[site][0].squares, x[0].square().sum(0))
        assert found[site][0].gram is None


def test_data_that_breaks_a_model_is_refused_by_name():
    model, data = build("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    walking = walk(model, find_sites(model), data)
    assert next(walking).block.name == "model.layers.0"
    with pytest.raises(ValueError, match=r"inputs of 'model\.layers\.1\.mlp\.down_proj\.weight' hold NaN"):
        next(walking)


class Copies(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ (self.weight.T * 2)


def test_weights_whose_inputs_cannot_be_seen_are_named():
    model = nn.Sequential(Copies(4, 4))
    with pytest.raises(ValueError, match=r"no input of '0\.weight' was seen.*skip='0\.weight'.*Magnitude"):
        list(walk(model, find_sites(model), [torch.zeros(1, 4)]))
    idle = nn.ModuleDict({"a": nn.Linear(4, 4)})
    idle.forward = lambda x: x
    with pytest.raises(ValueError, match=r"'a\.weight' was not reached"):
        list(walk(idle, find_sites(idle), [torch.zeros(1, 4)]))


def test_blocks_can_be_named():
    model, data = build("T5")
    sites = default_sites(model, find_sites(model))
    assert [b.name for b in blocks_of(model, sites, "encoder.block")][:3] == [f"encoder.block.{i}" for i in range(3)]
    layers = [c.block.name for c in walk(model, sites, data, blocks=["encoder.block.*.layer", "decoder.block"])]
    assert layers[:2] == ["encoder.block.0.layer.0", "encoder.block.0.layer.1"]
    with pytest.raises(ValueError, match="blocks='nowhere' matches no module"):
        blocks_of(model, sites, "nowhere")


def test_default_sites_are_inside_of_blocks_and_never_tied():
    model, _ = build("GPT2")
    names = [site.name for site in default_sites(model, find_sites(model))]
    assert len(names) == 12
    assert all(name.startswith("transformer.h.") for name in names)
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert len(default_sites(plain, find_sites(plain))) == 2


def test_a_walk_under_autocast():
    model, data = build("Llama")
    sites = default_sites(model, find_sites(model))
    tokens: list[int] = []
    with torch.autocast("cpu", torch.bfloat16):
        for captured in walk(model, sites, data):
            assert not captured.fallback
            tokens += [part.tokens for parts in captured.statistics.values() for part in parts]
            torch.clear_autocast_cache()  # for the reference: the blocks before this one have changed
            for site, x in hooked(model, data, list(captured.block.sites)).items():
                assert close(captured.statistics[site][0].squares, x[0].bfloat16().double().square().sum(0))
            shrink(captured)
    assert tokens == [42] * 21
