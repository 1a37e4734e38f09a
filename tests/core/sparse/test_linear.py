"""SparseLinear: an nn.Linear of which only the non-zeros exist."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.core.sparse import SparseLinear, Structure, to_dense
from rarefy.core.sparse.linear import to_sparse


def pair(dtype: torch.dtype = torch.float64, bias: bool = True, density: float = 0.3) -> tuple[nn.Linear, SparseLinear]:
    """A Linear that holds zeros, and its sparse twin."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Linear(13, 7, bias=bias, dtype=dtype)
        mask = torch.rand(7, 13) < density
    dense.weight.data[~mask] = 0.0
    return dense, to_sparse(copy.deepcopy(dense), Structure.of_mask(mask))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(13,), (1, 13), (5, 13), (0, 13), (2, 3, 13), (2, 0, 3, 13)])
def test_forward_and_gradients_are_those_of_the_dense_layer(shape: tuple[int, ...], bias: bool) -> None:
    dense, sparse = pair(bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = dense(one), sparse(other)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    (expected * expected.detach().cos()).sum().backward()
    (found * found.detach().cos()).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    assert dense.weight.grad is not None
    torch.testing.assert_close(other.grad, one.grad)
    torch.testing.assert_close(sparse.values.grad, dense.weight.grad[sparse.structure.mask()])
    if bias:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)


def test_autograd_agrees_with_finite_differences() -> None:
    _, sparse = pair()
    x = torch.randn(4, 13, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, v, b: torch.func.functional_call(sparse, {"values": v, "bias": b}, (x,)), (
        x, sparse.values, sparse.bias,
    ))  # fmt: skip


def test_samples_come_out_feature_major_and_sequences_do_not() -> None:
    _, sparse = pair()
    y = sparse(torch.randn(5, 13, dtype=torch.float64))
    assert y.t().is_contiguous()
    assert F.relu(y).t().is_contiguous()
    assert sparse(torch.randn(5, 2, 13, dtype=torch.float64)).is_contiguous()


def test_frozen_values_and_inputs_without_a_graph_cost_nothing() -> None:
    _, sparse = pair()
    sparse.values.requires_grad_(False)
    x = torch.randn(5, 13, dtype=torch.float64)
    sparse(x).sum().backward()
    assert sparse.values.grad is None
    assert sparse.bias.grad is not None
    with torch.no_grad():
        assert sparse(x).grad_fn is None


def test_a_nan_input_reaches_what_keeps_a_weight_there() -> None:
    _, sparse = pair(torch.float32)
    x = torch.ones(20, 13)
    x[:, 4] = float("nan")
    reached = sparse(x).isnan().all(0)
    assert bool(reached[sparse.structure.mask()[:, 4]].all())


def test_what_does_not_fit_is_refused() -> None:
    _, sparse = pair(torch.float32)
    with pytest.raises(ValueError, match=r"13 features, got shape \(2, 12\)"):
        sparse(torch.zeros(2, 12))
    with pytest.raises(ValueError, match="13 features"):
        sparse(torch.zeros(()))
    with pytest.raises(TypeError, match=r"torch.float32 on cpu .* got torch.float64"):
        sparse(torch.zeros(2, 13, dtype=torch.float64))
    with pytest.raises(TypeError, match="end"):
        nn.Sequential(sparse).half()
    with pytest.raises(TypeError, match="meta"):
        sparse.to("meta")
    with pytest.raises(TypeError, match=r"rarefy\.sparsify"):
        SparseLinear(3, 4)
    assert sparse.double()(torch.zeros(2, 13, dtype=torch.float64)).dtype is torch.float64


def test_differentiating_twice_is_refused() -> None:
    _, sparse = pair()
    x = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sparse(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_under_autocast_a_sparse_layer_runs_in_its_own_precision() -> None:
    dense, sparse = pair(torch.float32)
    x = torch.randn(5, 13)
    with torch.autocast("cpu", torch.bfloat16):
        found = sparse(x.bfloat16())
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, dense(x.bfloat16().float()))


@pytest.mark.slow
def test_compiled_models_call_it_as_it_is() -> None:
    _, sparse = pair(torch.float32)
    model = nn.Sequential(sparse, nn.ReLU())
    x = torch.randn(5, 13)
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


# -- its state -------------------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_weight_reads_as_the_dense_matrix() -> None:
    dense, sparse = pair()
    assert torch.equal(sparse.weight, dense.weight)
    assert not sparse.weight.requires_grad
    assert [name for name, _ in sparse.named_parameters()] == ["values", "bias"]


def test_state_brings_its_structure() -> None:
    """Into a layer of another structure, of as many non-zeros or more."""
    dense, sparse = pair()
    state = through_a_file(nn.Sequential(sparse).state_dict())
    assert set(state) == {"0.values", "0.bias", "0.columns", "0.starts"}
    for density in (0.3, 0.8):
        _, other = pair(density=density)
        other.structure.become(Structure.of_mask(other.structure.mask().roll(1, 1)))
        values, pointer = other.values, other.values.data_ptr()
        nn.Sequential(other).load_state_dict(state)
        assert other.values is values
        assert (other.values.data_ptr() == pointer) == (density == 0.3)
        assert torch.equal(other.weight, dense.weight)
        x = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(other(x), dense(x))
        other(x).sum().backward()


def test_state_of_the_dense_layer_is_taken_where_it_fits() -> None:
    dense, sparse = pair()
    dense.weight.data *= 2
    sparse.load_state_dict(dense.state_dict())
    assert torch.equal(sparse.weight, dense.weight)
    dense.weight.data += 1
    with pytest.raises(RuntimeError, match="entries of a dense weight are not zero"):
        sparse.load_state_dict(dense.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": None}, "Missing key.*columns"),
        ({"columns": torch.zeros(4, dtype=torch.uint16)}, "starts must be"),
        ({"values": torch.zeros(3)}, "need as many values"),
        ({"starts": torch.zeros(8)}, "whole numbers"),
    ],
)
def test_damaged_state_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    _, sparse = pair()
    before = sparse.weight
    state = {key: value for key, value in ({**sparse.state_dict(), **change}).items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        sparse.load_state_dict(state)
    assert torch.equal(sparse.weight, before)


def test_copies_are_their_own() -> None:
    dense, sparse = pair()
    sparse.gathers = print
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(copy.deepcopy(sparse)))):  # noqa: S301
        assert twin.gathers is None
        twin.structure.become(Structure.of_mask(twin.structure.mask().roll(1, 1)))
        assert torch.equal(sparse.weight, dense.weight)
        assert not torch.equal(twin.weight, dense.weight)


def test_there_and_back() -> None:
    """The same Parameter under its old name and in its old place, while a graph of it is alive."""
    dense, _ = pair()
    model = nn.Sequential(copy.deepcopy(dense), nn.Linear(7, 2, dtype=torch.float64))
    parameters = list(model.parameters())
    x = torch.randn(3, 13, dtype=torch.float64)
    loss = model(x).sum()
    loss.backward()
    assert parameters[0].grad is not None
    gradient = parameters[0].grad.clone()
    mask = dense.weight.ne(0)
    assert isinstance(model[0], nn.Linear)
    to_sparse(model[0], Structure.of_mask(mask))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(parameters[0].grad, gradient[mask])
    model(x).sum().backward()
    to_dense(model)
    assert type(model[0]) is nn.Linear
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.equal(model[0].weight, dense.weight)
    torch.testing.assert_close(parameters[0].grad, 2 * gradient * mask)
    model(x).sum().backward()
    assert loss.grad_fn is not None
