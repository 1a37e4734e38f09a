"""Every one-shot method on tiny models of many architectures: counts, patterns, zeros, everything else, and files."""

import itertools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rarefy
from architectures import ARCHITECTURES, build
from model_directories import assert_same_bits, tensors
from rarefy.core.capture import blocks_of, default_sites
from rarefy.core.sites import Site, find_sites
from rarefy.io import check_directory, collect, read_model, unpack_directory, write_model, write_packed
from rarefy.io.prune import chosen_sites, prune

METHODS: dict[str, Any] = {
    "magnitude": lambda **of: rarefy.Magnitude(0.5, allocation="uniform", **of),
    "wanda": lambda **of: rarefy.Wanda(0.5, **of),
    "sparse_gpt": lambda **of: rarefy.SparseGPT(0.5, **of),
    "dsnot": lambda **of: rarefy.DSnoT(rarefy.Wanda(0.5, **of)),
    "alps": lambda **of: rarefy.ALPS(0.5, **of),
    "refit": lambda **of: rarefy.Refit(rarefy.Wanda(0.5, **of)),
    "owl": lambda **of: rarefy.Wanda(0.5, allocation=rarefy.OWL(outlier=2.0), **of),
}
BY_ROW = {"wanda", "dsnot", "refit", "owl"}  # rows keep equally many; with the others a matrix keeps its exact count
REWRITES = {"sparse_gpt", "alps", "refit"}
PATTERNS = ["unstructured", "2:4"]
NAMES = list(ARCHITECTURES)

# Batches enough that a token reaches every expert: a warning that none did fails the test.
BATCHES = 4


def cases() -> Iterator[Any]:
    """Each architecture with every method, the patterns taking turns; two of them, rotated through, are not slow."""
    methods = list(METHODS)
    for (index, name), (shift, pattern) in itertools.product(enumerate(NAMES), enumerate(PATTERNS)):
        for turn, method in enumerate(methods):
            first = method == methods[(index + 3 * shift) % len(methods)]
            if not first and (index + turn + shift) % 2:
                continue
            marks = () if first else pytest.mark.slow
            yield pytest.param(name, method, pattern, marks=marks, id=f"{name}-{method}-{pattern}")


def names_of(model: nn.Module) -> list[str]:
    return [site.name for site in default_sites(model, find_sites(model))]


def rows_of(model: nn.Module, name: str, tensor: Tensor) -> list[np.ndarray]:
    """The matrices of a weight, each (out, positions of the kernel, in), by what is known of the modules themselves."""
    owner = model.get_submodule(name.rpartition(".")[0])
    found = tensor.detach().numpy()
    if type(owner).__name__ == "Conv1D":
        return [found.T[:, None]]
    if type(owner).__name__.endswith("Experts"):
        return [(one.T if "GptOss" in type(owner).__name__ else one)[:, None] for one in found]
    if found.ndim == 2:
        return [found[:, None]]
    groups = owner.groups if isinstance(owner, nn.Conv1d | nn.Conv2d) else 1
    return np.split(np.moveaxis(found, 1, -1).reshape(len(found), -1, found.shape[1]), groups)


def assert_counts(model: nn.Module, handle: rarefy.Sparsity, method: str, pattern: str) -> None:
    shares: dict[str, Fraction] = {}
    for site in handle.sites:
        matrices = rows_of(model, site.name, site.mask)
        if pattern == "2:4":
            shares[site.name] = assert_groups(site, matrices)
        elif method == "magnitude":
            assert sum(int(m.sum()) for m in matrices) == site.numel // 2
        elif method in BY_ROW:
            (of_a_row,) = {int(count) for m in matrices for count in m.sum((1, 2))}
            shares[site.name] = Fraction(of_a_row, matrices[0][0].size)
        else:
            assert all(int(m.sum()) == m.size // 2 for m in matrices)
        assert handle.kept(site) == site.asked == int(site.mask.sum())
    if method == "owl":
        assert_owl(model, handle, pattern, shares)
    else:
        assert set(shares.values()) <= {Fraction(1, 2)}


def assert_groups(site: Site, matrices: list[np.ndarray]) -> Fraction:
    """n of every 4 along the inputs, for the n of the site; ⌈n·L/4⌉ of L < 4 that are left (depthwise convolutions)."""
    pattern: Any = site.pattern
    assert pattern.m == 4
    for matrix in matrices:
        full = matrix.shape[2] - matrix.shape[2] % 4
        groups = matrix[..., :full].reshape(-1, 4)
        assert (groups.sum(1) == pattern.n).all()
        rest = matrix[..., full:]
        assert (rest.sum(2) == math.ceil(pattern.n * rest.shape[2] / 4)).all()
    return Fraction(pattern.n, 4)


def assert_owl(model: nn.Module, handle: rarefy.Sparsity, pattern: str, shares: dict[str, Fraction]) -> None:
    """Blocks keep different shares, the sites of one the same as far as rows allow, and half is kept overall."""
    sizes = {site.name: site.numel for site in handle.sites}
    blocks = [[site.name for site in block.sites] for block in blocks_of(model, handle.sites)]
    of_block = [sum(sizes[name] for name in names) for names in blocks]
    # What rounding can do: half a weight of each row; n is a whole number, so that no block can be moved any nearer.
    step = {name: Fraction(1, rows_of(model, name, mask)[0][0].size) for name, mask in handle.masks.items()}
    rounded = sum(step[name] * sizes[name] / 2 for name in sizes) + 1
    slack = rounded if pattern == "unstructured" else Fraction(max(of_block), 8)
    assert abs(sum((shares[name] - Fraction(1, 2)) * sizes[name] for name in sizes)) <= slack
    for names in blocks:
        low, high = min(shares[name] for name in names), max(shares[name] for name in names)
        assert high - low <= (max(step[name] for name in names) if pattern == "unstructured" else 0)
    assert len(set(shares.values())) > 1


@pytest.mark.parametrize(("name", "method", "pattern"), list(cases()))
def test_each_method_on_each_architecture(name: str, method: str, pattern: str):
    model, data = build(name, BATCHES)
    names = names_of(model)
    before, were, dense = bits(model), state_of(model), outputs(model, data[0])
    handle = rarefy.sparsify(model, METHODS[method](pattern=pattern), data=data, only=names)
    rarefy.check(model, handle)
    assert [site.name for site in handle.sites] == names
    assert_counts(model, handle, method, pattern)
    assert state_of(model) == were
    after, masks = bits(model), handle.masks
    assert after.keys() == before.keys()
    for key, old in before.items():
        if key not in masks:
            assert np.array_equal(after[key], old), key
            continue
        mask = masks[key].numpy()
        assert not after[key][~mask].any(), key  # all bits are zero: +0.0
        if method not in REWRITES:
            assert np.array_equal(after[key][mask], old[mask]), key
    found = outputs(model, data[0])
    assert len(found) == len(dense) > 0
    assert all(bool(torch.isfinite(x).all()) for x in found)
    assert not all(torch.equal(x, y) for x, y in zip(found, dense, strict=True))


def bits(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies of all parameters and buffers, those that are not saved too; floats as the integers of their bits."""
    named: Iterable[tuple[str, Tensor]] = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    kinds = {torch.float32: torch.int32}
    return {name: t.detach().clone().view(kinds.get(t.dtype, t.dtype)).numpy() for name, t in named}


def state_of(model: nn.Module) -> Any:
    """What else a caller would miss: modes, hooks, gradients, the configuration, the random numbers to come."""
    modules = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    ties = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return modules, flags, ties, str(getattr(model, "config", None)), torch.get_rng_state().tolist()


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The floating-point tensors that the model returns for a batch, as far as they are not within others."""
    with torch.no_grad():
        found = model(**batch)
    return [x for x in found.values() if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_written_and_read_again(name: str, tmp_path: Path):
    """By `write_model` and by `save_pretrained`, one method and pattern for each architecture."""
    made, data = build(name, BATCHES)
    index = NAMES.index(name)
    method, pattern = list(METHODS)[(index + 1) % len(METHODS)], PATTERNS[index // 2 % 2]
    made.save_pretrained(tmp_path / "dense")
    model: Any = read_model(tmp_path / "dense")
    handle = rarefy.sparsify(model, METHODS[method](pattern=pattern), data=data, only=names_of(model))
    changes, record = collect(model, handle, tmp_path / "dense")
    write_model(tmp_path / "dense", tmp_path / "sparse", changes, record)
    assert check_directory(tmp_path / "sparse").kept == sum(handle.kept(site) for site in handle.sites)
    assert (tmp_path / "sparse/config.json").read_bytes() == (tmp_path / "dense/config.json").read_bytes()
    model.save_pretrained(tmp_path / "saved")
    wanted, expected = bits(model), outputs(model, data[0])
    for loaded in (
        read_model(tmp_path / "sparse"),
        type(model).from_pretrained(tmp_path / "sparse"),
        type(model).from_pretrained(tmp_path / "saved"),
    ):
        found = bits(loaded)
        assert type(loaded) is type(model)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
        assert all(torch.equal(x, y) for x, y in zip(outputs(loaded.eval(), data[0]), expected, strict=True))


def test_directories_are_pruned_in_the_same_places():
    for name in NAMES:
        model, _ = build(name)
        assert chosen_sites(model) == names_of(model)


NOTHING_PACKED = {"GPT2", "ResNet"}  # their layers, Conv1D and Conv2d, have no packed form


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in {"Llama", "Whisper", "GPT2"} else pytest.mark.slow) for n in NAMES],
)
def test_a_pruned_model_is_packed_and_unpacked(name: str, tmp_path: Path):
    model, data = build(name)
    dense, sparse, packed = (tmp_path / each for each in ("dense", "sparse", "packed"))
    model.save_pretrained(dense)
    prune(dense, sparse, rarefy.Magnitude(0.8, allocation="uniform"))
    if name in NOTHING_PACKED:
        with pytest.raises(ValueError, match="no layer gains by being packed"):
            write_packed(sparse, packed)
        return
    assert write_packed(sparse, packed).packed
    check_directory(packed)
    loaded = type(model).from_pretrained(packed).eval()
    for x, y in zip(outputs(loaded, data[0]), outputs(read_model(sparse), data[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    unpack_directory(packed, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (dense / "config.json").read_bytes()
    assert_same_bits(tensors(tmp_path / "again"), tensors(sparse))
