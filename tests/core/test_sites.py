import hashlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tiny
from rarefy.core.sites import find_sites, site_hash


def names(model: nn.Module, **options) -> list[str]:
    return [site.name for site in find_sites(model, **options)]


class Everything(nn.Module):
    """One layer of every kind that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.c1, self.c2, self.c3 = nn.Conv1d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv3d(2, 4, 3)
        self.t1, self.t2 = nn.ConvTranspose1d(2, 4, 3), nn.ConvTranspose2d(4, 6, (3, 2), groups=2)
        self.t3 = nn.ConvTranspose3d(2, 4, 3)
        self.norm, self.layer_norm = nn.BatchNorm2d(4), nn.LayerNorm([3, 4])
        self.bilinear, self.rnn = nn.Bilinear(2, 3, 4), nn.LSTM(3, 4)
        self.attention = nn.MultiheadAttention(6, 2)
        self.free = nn.Parameter(torch.zeros(3, 3))
        self.block = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


DEFAULT = [f"{n}.weight" for n in ("c1", "c2", "c3", "t1", "t2", "t3", "attention.out_proj", "block.0", "block.2")]


def test_weights_of_linear_and_convolutions_in_the_order_of_the_model():
    assert names(Everything()) == DEFAULT
    order = list(Everything().state_dict())
    assert [n for n in order if n in DEFAULT] == DEFAULT


def test_shapes_are_outputs_inputs_kernel():
    shapes = {site.name: site.shape for site in find_sites(Everything())}
    assert shapes["c2.weight"] == (4, 2, 3, 3)
    assert shapes["t1.weight"] == (4, 2, 3)
    assert shapes["t2.weight"] == (6, 2, 3, 2)  # stored as (4, 3, 3, 2)
    assert shapes["block.0.weight"] == (4, 6)
    embedding = find_sites(Everything(), only="embed")[0]
    assert embedding.shape == (10, 6)


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("block.0.weight", ["block.0.weight"]),
        ("block.0", ["block.0.weight"]),
        ("block", ["block.0.weight", "block.2.weight"]),
        ("block.*", ["block.0.weight", "block.2.weight"]),
        ("*c?.weight", ["c1.weight", "c2.weight", "c3.weight"]),
        (nn.Embedding, ["embed.weight"]),
        (nn.LSTM, ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        ("attention", ["attention.in_proj_weight", "attention.out_proj.weight"]),
        ("free", ["free"]),
        (lambda name, module: getattr(module, "out_features", 0) == 2, ["block.2.weight"]),
        ([nn.Linear, "embed"], ["embed.weight", "attention.out_proj.weight", "block.0.weight", "block.2.weight"]),
        (("c1", "c1.weight"), ["c1.weight"]),
        ((x for x in ["c2", "c1"]), ["c1.weight", "c2.weight"]),
    ],
)
def test_only(only, expected: list[str]):
    assert names(Everything(), only=only) == expected


@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        ("block", {"block.0.weight", "block.2.weight"}),
        (nn.Linear, {"attention.out_proj.weight", "block.0.weight", "block.2.weight"}),
        (["c*", "t?"], {f"{k}{i}.weight" for k in "ct" for i in (1, 2, 3)}),
        ((x for x in ["c1"]), {"c1.weight"}),
        (lambda name, module: name.endswith("0.weight"), {"block.0.weight"}),
    ],
)
def test_skip(skip, left_out: set[str]):
    assert names(Everything(), skip=skip) == [n for n in DEFAULT if n not in left_out]


def test_only_then_skip():
    assert names(Everything(), only="block", skip="block.0") == ["block.2.weight"]


def test_a_selector_that_matches_nothing_names_near_ones():
    with pytest.raises(ValueError, match=r"only='blok\.0' matches no weight .* near: block\.0"):
        names(Everything(), only="blok.0")
    with pytest.raises(ValueError, match="skip='norm' matches no weight"):
        names(Everything(), skip="norm")
    with pytest.raises(ValueError, match="matches no weight"):
        names(Everything(), only=["c1", nn.Conv2d, nn.Bilinear, nn.GRU])


def test_nothing_left():
    for options in ({"skip": "*"}, {"only": "c1", "skip": nn.Conv1d}):
        with pytest.raises(ValueError, match="no site: Everything has 17 weight tensors"):
            names(Everything(), **options)
    with pytest.raises(ValueError, match="no site: BatchNorm1d has 0 weight tensors"):
        names(nn.BatchNorm1d(3))


def test_tied_weights_are_one_site_under_their_first_name():
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

    (site,) = find_sites(Language())
    assert site.name == "embed.weight"
    assert site.kind == "Linear"
    for selector in ("embed", "head", nn.Linear, nn.Embedding):
        assert names(Language(), only=selector) == ["embed.weight"]
        with pytest.raises(ValueError, match="no site"):
            names(Language(), skip=selector)


def test_a_shared_module_goes_by_all_its_names():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a

    assert names(Twice()) == names(Twice(), only="b") == ["a.weight"]


def test_matrices_that_a_layer_adds_are_not_meant():
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora_a = nn.Parameter(torch.zeros(2, 4))

    assert names(nn.Sequential(Adapted())) == ["0.weight"]
    assert names(nn.Sequential(Adapted()), only="0.lora_a") == ["0.lora_a"]


def computed() -> list[nn.Module]:
    return [
        nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)),
        nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3)),
        nn.Sequential(prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5), nn.Linear(3, 3)),
    ]


@pytest.mark.parametrize("model", computed(), ids=["weight_norm", "orthogonal", "prune"])
def test_computed_weights_cannot_hold_zeros(model: nn.Module):
    with pytest.raises(ValueError, match=r"'0\.weight' is computed from other parameters .* skip='0'"):
        names(model)
    assert names(model, skip="0") == ["1.weight"]
    assert names(model, only="1") == ["1.weight"]


def test_unfit_tensors():
    with pytest.raises(ValueError, match="lazy module"):
        names(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="meta device"):
        names(nn.Linear(3, 3, device="meta"))
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex64"):
        names(model)


def test_the_hash_is_of_names_and_shapes():
    assert site_hash(find_sites(tiny.mlp(0))) == site_hash(find_sites(tiny.mlp(1, torch.float32)))
    assert site_hash(find_sites(tiny.mlp())) != site_hash(find_sites(tiny.mlp(), skip="4"))
    assert site_hash(find_sites(nn.Linear(2, 3))) != site_hash(find_sites(nn.Linear(3, 2)))
    assert site_hash(find_sites(nn.Linear(2, 3))) == hashlib.sha256(b'[["weight",[3,2]]]').hexdigest()[:16]


def test_a_site_before_any_mask():
    (site,) = find_sites(nn.Linear(2, 3))
    assert site.mask.all()
    assert site.trainable.all()
    assert site.numel == 6
    assert torch.equal(site.weight, site.parameter)
    with pytest.raises(RuntimeError, match="has no gradient in this step"):
        _ = site.gradient


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.zeros(nx, nf)), nn.Parameter(torch.zeros(nf))


def test_transformers_linear_layer_that_stores_inputs_first():
    model = nn.ModuleDict({"c": Conv1D(6, 4)})
    (site,) = find_sites(model)
    assert (site.name, site.shape, site.stored_shape) == ("c.weight", (6, 4), (4, 6))
    other = nn.ModuleDict({"c": Conv1D(6, 4), "l": nn.Linear(2, 2)})
    del other["c"].nf  # some other class of that name
    assert names(other) == ["l.weight"]


class SomeExperts(nn.Module):
    def __init__(self, **said) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(3, 8, 4)), nn.Parameter(torch.zeros(3, 4, 5))
        self.bias, self.free = nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.zeros(3, 2, 2, 2))
        for name, value in said.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("said", "up", "down"),
    [
        ({}, (24, 4), (12, 5)),
        ({"is_transposed": False, "hidden_size": 8}, (24, 4), (12, 5)),
        ({"is_transposed": True}, (12, 8), (15, 4)),
        ({"hidden_size": 4}, (24, 4), (12, 5)),
        ({"hidden_dim": 8}, (12, 8), (12, 5)),  # `down_proj` has no axis of that length
    ],
)
def test_fused_experts_are_stacked_matrices(said, up: tuple[int, int], down: tuple[int, int]):
    first, second = find_sites(SomeExperts(**said))
    assert (first.name, second.name) == ("gate_up_proj", "down_proj")
    assert (first.shape, second.shape) == (up, down)
    assert first.layout.stacked == 3
    assert first.layout.restore(first.layout.canonical(first.weight)).shape == (3, 8, 4)


def test_experts_that_write_the_hidden_states_have_them_as_outputs():
    model = SomeExperts(hidden_size=5)
    assert [site.shape for site in find_sites(model, only="down_proj")] == [(15, 4)]
    model.hidden_size = 4
    assert [site.shape for site in find_sites(model, only="down_proj")] == [(12, 5)]
