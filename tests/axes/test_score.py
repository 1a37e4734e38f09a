import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.axes.score import Score, parse_score, register_score, scores
from rarefy.axes.value import from_dict

W = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
G = torch.tensor([[3.0, 0.5], [-2.0, 0.0]])


@pytest.fixture
def registry(monkeypatch):
    """Registrations of one test, undone after it."""
    from rarefy.axes import score

    monkeypatch.setattr(score, "_rules", dict(score._rules))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [[1.0, 2.0], [0.5, 4.0]]),
        ("taylor", [[3.0, 1.0], [1.0, 0.0]]),
        ("snip", [[3.0, -1.0], [-1.0, 0.0]]),  # signed: the pool takes the magnitude, after the sum
        ("grasp", [[3.0, -1.0], [-1.0, 0.0]]),
        ("synflow", [[3.0, 1.0], [1.0, 0.0]]),
    ],
)
def test_formula(name, expected):
    assert torch.equal(Score(name)(W, gradient=G), torch.tensor(expected))


@pytest.mark.parametrize(
    ("name", "gradient", "pool", "random"),
    [
        ("random", None, "mean_abs", True),
        ("magnitude", None, "mean_abs", False),
        ("taylor", "loss", "mean_abs", False),
        ("snip", "loss", "abs_mean", False),
        ("grasp", "curvature", "mean", False),
        ("synflow", "flow", "mean_abs", False),
    ],
)
def test_what_each_score_needs(name, gradient, pool, random):
    score = Score(name)
    assert (score.gradient, score.pool, score.random) == (gradient, pool, random)


def test_snip_is_the_gradient_of_a_multiplicative_mask():
    torch.manual_seed(0)
    x, w = torch.randn(7, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    c = torch.ones_like(w, requires_grad=True)
    gradient_w, gradient_c = torch.autograd.grad((x @ (c * w).T).tanh().square().sum(), (w, c))
    assert torch.allclose(Score("snip")(w, gradient_w), gradient_c, rtol=0, atol=1e-12)


def test_synflow_is_conserved_from_layer_to_layer():
    torch.manual_seed(0)
    a, b = (torch.randn(s, dtype=torch.float64).abs().requires_grad_() for s in ((3, 4), (2, 3)))
    flow = (torch.ones(1, 4, dtype=torch.float64) @ a.T @ b.T).sum()
    score_a, score_b = (Score("synflow")(w, g) for w, g in zip((a, b), torch.autograd.grad(flow, (a, b)), strict=True))
    assert score_a.sum().item() == pytest.approx(flow.item())
    assert torch.allclose(score_a.sum(1), score_b.sum(0))  # into and out of each hidden neuron


def test_half_precision_products_do_not_underflow():
    w = torch.full((2,), 2.0**-14, dtype=torch.float16)
    g = torch.tensor([2.0**-14, 2.0**-13], dtype=torch.float16)
    assert Score("taylor")(w, g).tolist() == [2.0**-28, 2.0**-27]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2**31))
def test_random_is_drawn_in_row_order_in_float64(shape, seed):
    weight = torch.zeros(shape)
    drawn = Score("random")(weight, generator=generator(seed))
    flat = torch.rand(weight.numel(), dtype=torch.float64, generator=generator(seed))
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn.flatten(), flat)


def test_random_ignores_the_memory_format():
    weight = torch.zeros(4, 3, 2, 2)
    last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(Score("random")(weight, generator=generator()), Score("random")(last, generator=generator()))


def test_random_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Score("random")(W, generator=generator())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["magnitude", "taylor", "snip", "grasp", "synflow"])
def test_scores_are_pure(name):
    w, g = torch.nn.Parameter(W.clone()), G.clone()
    result = Score(name)(w, g)
    result.zero_()
    assert torch.equal(w.detach(), W)
    assert torch.equal(g, G)
    assert not result.requires_grad


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_missing_gradient_is_named():
    with pytest.raises(ValueError, match="'grasp' needs the curvature gradient"):
        Score("grasp")(W)


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"gradient has shape \(2, 1\), the weight \(2, 2\)"):
        Score("snip")(W, G[:, :1])


def test_random_needs_a_generator():
    with pytest.raises(ValueError, match="generator on the CPU, got none"):
        Score("random")(W)


@pytest.mark.parametrize("make", [Score, parse_score, lambda name: from_dict({"kind": "Score", "name": name})])
def test_an_unknown_score_names_near_ones(make):
    with pytest.raises(ValueError, match="did you mean 'magnitude'"):
        make("magnitud")


@pytest.mark.parametrize("x", [None, 3, {"name": "snip"}, abs])
def test_what_is_no_score_is_refused(x):
    with pytest.raises(ValueError, match=r"score|kind"):
        parse_score(x)


# --- the registry ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registry")
def test_register_returns_the_function():
    def function(weight, gradient, generator):
        return -weight.abs()

    assert register_score("small", function, pool="mean") is function
    assert Score("small").pool == "mean"
    assert Score("small")(W).tolist() == [[-1.0, -2.0], [-0.5, -4.0]]
    assert scores()[-1] == "small"


@pytest.mark.usefixtures("registry")
def test_register_as_a_decorator():
    @register_score("squared", gradient="loss")
    def squared(weight, gradient, generator):
        return weight**2 * gradient

    assert squared(W, G, None)[0, 0] == 3
    assert Score("squared").gradient == "loss"


@pytest.mark.usefixtures("registry")
def test_what_is_not_asked_for_is_not_given():
    seen = []
    register_score("nosy", lambda weight, gradient, generator: seen.append((gradient, generator)) or weight)
    Score("nosy")(W, G, generator())
    assert seen == [(None, None)]


@pytest.mark.usefixtures("registry")
def test_a_name_is_not_overwritten():
    with pytest.raises(ValueError, match=r"register_score\('snip'\): the name is taken"):
        register_score("snip", lambda weight, gradient, generator: weight)
    decorate = register_score("once")
    decorate(lambda weight, gradient, generator: weight)
    with pytest.raises(ValueError, match="taken"):
        decorate(lambda weight, gradient, generator: -weight)
    assert torch.equal(Score("once")(W), W)


@pytest.mark.parametrize("options", [{"gradient": "hessian"}, {"pool": "max"}])
def test_registration_checks_its_options(options):
    with pytest.raises(ValueError, match="must be one of"):
        register_score("other", lambda weight, gradient, generator: weight, **options)
    assert "other" not in scores()


@pytest.mark.usefixtures("registry")
def test_a_score_of_another_shape_is_refused():
    register_score("rows", lambda weight, gradient, generator: weight.abs().sum(1))
    with pytest.raises(ValueError, match="one score per weight"):
        Score("rows")(W)


@pytest.mark.parametrize("name", scores())
def test_round_trip(name):
    score = Score(name)
    assert from_dict(json.loads(json.dumps(score.to_dict()))) == score
    assert parse_score(name) == parse_score(score) == parse_score(score.to_dict()) == score
    assert str(score) == name
