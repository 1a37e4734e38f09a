"""Block by block: budgets, what is written, what is put back."""

import copy

import pytest
import torch
from torch import nn

import rarefy
import tiny
from methods.one_shot.layers import batches, generator, mlp, statistics
from rarefy.axes import NM, OWL, AtLeast, count
from rarefy.methods.one_shot import budgets, layerwise, run
from rarefy.methods.one_shot.alps import ALPS
from rarefy.methods.one_shot.dsnot import DSnoT
from rarefy.methods.one_shot.magnitude import Magnitude
from rarefy.methods.one_shot.matrix import choose_mask
from rarefy.methods.one_shot.originals import Originals
from rarefy.methods.one_shot.refit import Refit, refit
from rarefy.methods.one_shot.sparse_gpt import SparseGPT
from rarefy.methods.one_shot.wanda import Wanda

METHODS = [
    lambda **axes: Wanda(**axes),
    lambda **axes: Wanda(**axes, group="layer"),
    lambda **axes: SparseGPT(**axes, block_size=8),
    lambda **axes: ALPS(**axes, iterations=30),
    lambda **axes: Refit(Wanda(**axes)),
    lambda **axes: Refit(Magnitude(**{"allocation": "uniform"} | axes)),
    lambda **axes: Refit(SparseGPT(**axes)),
    lambda **axes: DSnoT(Wanda(**axes)),
    lambda **axes: Refit(DSnoT(Magnitude(**{"allocation": "uniform"} | axes))),
]
BY_ROW = {0, 4, 7}


def assert_zeros(model: nn.Module, s: rarefy.Sparsity) -> None:
    for name, mask in s.masks.items():
        assert tiny.positive_zero(model.get_parameter(name)[~mask]), name


@pytest.mark.parametrize("make", range(len(METHODS)))
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_counts_zeros_and_check(make: int, pattern: str):
    model = mlp()
    method = METHODS[make](sparsity=0.7, pattern=pattern)
    s = rarefy.sparsify(model, method, data=batches())
    assert_zeros(model, s)
    rarefy.check(model, s)
    for site in s.sites:
        if pattern == "2:4":
            assert s.kept(site) == site.numel // 2
        elif make in BY_ROW:
            assert site.mask.sum(1).tolist() == [count(0.7, site.shape[1])] * site.shape[0]
        else:
            assert s.kept(site) == count(0.7, site.numel)
    assert s.density(s.sites[0].name) < 1


def test_wanda_reads_the_inputs_that_the_pruned_blocks_make():
    model, dense = mlp(), mlp()
    s = rarefy.sparsify(model, Wanda(0.5, group="layer"), data=batches())
    x = torch.cat(batches())
    with torch.no_grad():
        pruned = model[1][0](model[0](x)).relu()  # block 1's first layer is pruned too, but its own inputs are dense
        inside = dense[1][0](model[0](x)).relu()
    weight = dense[1][2].weight.detach()
    for inputs, same in ((inside, True), (pruned, False)):
        scores = weight.abs() * statistics(inputs).squares.sqrt()
        half = choose_mask(scores, s.sites[3].pattern, weight.numel() // 2, budgets.exact_share(0.5))
        assert torch.equal(half, s.masks["1.2.weight"]) is same


def test_refit_starts_from_dense_weights_and_pruned_inputs():
    model, dense = mlp(), mlp()
    s = rarefy.sparsify(model, Refit(Magnitude(0.5, "uniform")), data=batches())
    with torch.no_grad():
        x = model[0](torch.cat(batches()))
    expected = refit(dense[1][0].weight.detach(), s.masks["1.0.weight"], x.t() @ x)
    torch.testing.assert_close(model[1][0].weight.detach(), expected)


def test_a_global_first_mask_is_kept_as_it_is():
    model = mlp()
    start = rarefy.sparsify(copy.deepcopy(model), Magnitude(0.7)).masks
    s = rarefy.sparsify(model, Refit(Magnitude(0.7)), data=batches())
    assert all(torch.equal(mask, start[name]) for name, mask in s.masks.items())


@pytest.mark.parametrize("allocation", ["erdos_renyi", {"0.*": 0.3}, OWL(outlier=2.0)])
def test_allocations_are_exact(allocation):
    s = rarefy.sparsify(mlp(), SparseGPT(0.7, allocation), data=batches())
    kept, sizes = [s.kept(site) for site in s.sites], [site.numel for site in s.sites]
    if isinstance(allocation, dict):
        shares = [0.3 if site.name.startswith("0.") else 0.7 for site in s.sites]
        assert kept == [count(share, n) for share, n in zip(shares, sizes, strict=True)]
    else:
        assert sum(kept) == count(0.7, sum(sizes))
        assert len({k / n for k, n in zip(kept, sizes, strict=True)}) > 1


def test_owl_keeps_more_where_outliers_are():
    model, data = mlp(), batches()
    with torch.no_grad():
        model[1][0].weight[:, 0] *= 100
    method = Wanda(0.7, OWL(outlier=5.0), group="layer")
    s = rarefy.sparsify(model, method, data=iter(data))  # read twice, though it can be read once only
    by_block = [sum(s.kept(site) for site in s.sites if site.name.startswith(f"{b}.")) for b in range(3)]
    sizes = [sum(site.numel for site in s.sites if site.name.startswith(f"{b}.")) for b in range(3)]
    density = [k / n for k, n in zip(by_block, sizes, strict=True)]
    assert density[1] == max(density)
    assert sum(by_block) == count(0.7, sum(sizes))
    assert max(density) - min(density) <= 0.16 + 3 / min(sizes)  # but for rounding


def test_owl_with_groups_varies_n():
    model = mlp()
    with torch.no_grad():
        model[1][0].weight[:, 0] *= 100
    s = rarefy.sparsify(model, Wanda(allocation=OWL(outlier=6.0), pattern="4:8"), data=batches())
    patterns = [site.pattern for site in s.sites]
    assert patterns[2] == patterns[3] != patterns[0]
    assert all(isinstance(p, NM) and p.m == 8 for p in patterns)
    assert all(site.pattern.legal(site.mask) for site in s.sites)


@pytest.mark.parametrize("allocation", ["owl", AtLeast("owl")])
@pytest.mark.parametrize("asked", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_owl_is_refused_by_methods_that_see_no_inputs(asked, allocation):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="use it with Wanda, SparseGPT or ALPS"):
        rarefy.sparsify(model, Magnitude(allocation=allocation, **asked))
    with pytest.raises(ValueError, match="use it with Wanda, SparseGPT or ALPS"):
        rarefy.sparsify(model, Refit(Magnitude(allocation=allocation, **asked)), data=batches())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_outliers_are_counted_over_the_block():
    """Scores 8·1 (one) and 1 (seven of them): mean 15/8, twice that is 3.75: one of eight."""
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)[0, 0] = 8.0
    (site,) = rarefy.core.find_sites(model)
    assert budgets.outliers({site: [statistics(torch.ones(1, 4))]}, 2.0) == 12.5


def test_bfloat16_weights_that_round_to_zero_stay_kept():
    model = mlp(torch.bfloat16)
    with torch.no_grad():
        model[0][0].weight[:, 3] = 0
    s = rarefy.sparsify(model, SparseGPT(0.5), data=[b.bfloat16() for b in batches()])
    assert model[0][0].weight.dtype == torch.bfloat16
    assert s.kept(s.sites[0]) == count(0.5, s.sites[0].numel)
    rarefy.check(model, s)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2:3", "4x1"])
@pytest.mark.parametrize("make", [0, 2, 3, 4])
def test_convolutions(pattern: str, make: int):
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))

    model = tiny.seeded(build).double()
    data = [torch.randn(4, 6, 6, 6, generator=generator(0), dtype=torch.float64)]
    method = METHODS[make](sparsity=0.5, pattern=pattern)
    s = rarefy.sparsify(model, method, data=data)
    rarefy.check(model, s)
    assert_zeros(model, s)
    assert all(site.pattern.legal(site.mask) for site in s.sites)


def test_refit_of_a_grouped_convolution_lowers_its_error():
    model = tiny.seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))).double()
    dense, data = copy.deepcopy(model), [torch.randn(8, 8, 6, 6, generator=generator(0), dtype=torch.float64) + 1]
    bare = copy.deepcopy(model)
    rarefy.sparsify(bare, Wanda(pattern="2:4"), data=data)
    rarefy.sparsify(model, Refit(Wanda(pattern="2:4")), data=data)
    with torch.no_grad():
        errors = [float((m(data[0]) - dense(data[0])).square().sum()) for m in (bare, model)]
    assert errors[1] < errors[0]


def test_matrices_that_no_input_reached_go_by_magnitude(monkeypatch):
    walk = run.walk

    def without(model, sites, data, **how):
        for captured in walk(model, sites, data, **how):
            for site in list(captured.statistics):
                if site.name == "1.0.weight":
                    captured.statistics[site] = [statistics(torch.zeros(1, 16))]
                elif site.name == "2.0.weight":
                    del captured.statistics[site]
            yield captured

    monkeypatch.setattr(run, "walk", without)
    model = mlp()
    by_magnitude = rarefy.sparsify(copy.deepcopy(model), Magnitude(0.5, "uniform")).masks
    with pytest.warns(UserWarning, match=r"no calibration input reached 2 matrices \(1\.0\.weight, 2\.0\.weight\)"):
        s = rarefy.sparsify(model, SparseGPT(0.5), data=batches())
    for name in ("1.0.weight", "2.0.weight"):
        assert torch.equal(s.masks[name], by_magnitude[name])


@pytest.mark.parametrize("in_memory", [1 << 30, 100])
def test_a_failure_puts_every_weight_back_and_names_the_block(monkeypatch, in_memory: int):
    monkeypatch.setattr(layerwise, "Originals", lambda: Originals(in_memory))
    model = mlp()
    before, solved = tiny.picture(model), []

    def fail_at_third(self, matrix):
        solved.append(matrix.name)
        if matrix.name == "2.0.weight":
            raise ValueError("no luck.")
        return original(self, matrix)

    original = SparseGPT.solve
    monkeypatch.setattr(SparseGPT, "solve", fail_at_third)
    with pytest.raises(ValueError, match=r"block '2': no luck\. Every weight was put back\."):
        rarefy.sparsify(model, SparseGPT(0.5), data=batches())
    assert solved == ["0.0.weight", "0.2.weight", "1.0.weight", "1.2.weight", "2.0.weight"]
    assert tiny.picture(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KeyError("x")])
def test_other_failures(monkeypatch, error):
    model = mlp()
    before = tiny.picture(model)

    def fail(self, matrix):
        if matrix.name == "1.2.weight":
            raise error
        return original(self, matrix)

    original = Wanda.solve
    monkeypatch.setattr(Wanda, "solve", fail)
    kind, match = (KeyboardInterrupt, None) if isinstance(error, KeyboardInterrupt) else (RuntimeError, "block '1'")
    with pytest.raises(kind, match=match):
        rarefy.sparsify(model, Wanda(0.5), data=batches())
    assert tiny.picture(model) == before


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="sparsity=None, but the pattern unstructured"):
        rarefy.sparsify(mlp(), Wanda(), data=batches())
    with pytest.raises(ValueError, match="sparsity=None, but the pattern unstructured"):
        rarefy.sparsify(mlp(), Wanda(allocation="owl"), data=batches())
    with pytest.raises(ValueError, match="needs data="):
        rarefy.sparsify(mlp(), Wanda(0.5))
    with pytest.raises(ValueError, match="compares the scores of all layers"):
        Wanda(0.5, AtLeast("global"))
