"""The three products against float64, compiled and by torch, for ragged shapes and either memory order."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rarefy.core import native
from rarefy.core.sparse import kernels
from rarefy.core.sparse.structure import Structure

SHAPES = [(1, 1, 1), (3, 5, 2), (16, 64, 128), (17, 65, 33), (130, 70, 128), (1, 300, 7), (300, 1, 7), (64, 96, 0)]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the compiled kernels where there are any, and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    kernels._kernel.cache_clear()
    yield
    kernels._kernel.cache_clear()


def case(rows: int, cols: int, tokens: int, density: float, dtype: torch.dtype) -> tuple[Structure, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows + cols + tokens)
    mask = torch.rand(rows, cols, generator=g) < density
    dense = torch.randn(rows, cols, generator=g, dtype=dtype).masked_fill(~mask, 0.0)
    return Structure.of_mask(mask), dense, torch.randn(tokens, cols, generator=g, dtype=dtype)


def close(found: Tensor, expected: Tensor, terms: int, dtype: torch.dtype) -> bool:
    room = (1e-6 if dtype is torch.float32 else 1e-15) * (terms + 8) ** 0.5 * 8
    return bool(((found.double() - expected).abs() <= room * (1 + expected.abs())).all())


def layouts(t: Tensor) -> list[Tensor]:
    return [t.contiguous(), t.t().contiguous().t(), torch.cat([t, t], dim=1)[:, : t.shape[1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_dense_matrix(
    shape: tuple[int, int, int], density: float, dtype: torch.dtype
) -> None:
    rows, cols, tokens = shape
    structure, dense, given = case(*shape, density, dtype)
    values, bias = dense[structure.mask()], torch.randn(rows, dtype=dtype)
    transposed = kernels.permute(values, structure.order)
    assert torch.equal(transposed, dense.t()[structure.mask().t()])
    expected = given.double() @ dense.double().t() + bias.double()
    for x in layouts(given):
        for feature_major in (False, True):
            y = kernels.empty(tokens, rows, x, feature_major=feature_major).fill_(float("nan"))
            kernels.multiply(values, structure.by_row, kernels.walkable(x), y, bias)
            assert close(y, expected, cols, dtype)
    for dy in layouts(torch.randn(tokens, rows, dtype=dtype)):
        dx = kernels.empty(tokens, cols, dy, feature_major=True)
        kernels.multiply(transposed, structure.by_column, kernels.walkable(dy), dx)
        assert close(dx, dy.double() @ dense.double(), rows, dtype)
        for x in layouts(given):
            found = kernels.weight_gradient(structure.by_row, kernels.walkable(x), kernels.walkable(dy))
            assert close(found, (dy.double().t() @ x.double())[structure.mask()], tokens, dtype)


def test_the_same_bits_for_any_number_of_threads() -> None:
    structure, dense, x = case(130, 250, 64, 0.2, torch.float32)
    values, dy = dense[structure.mask()], torch.randn(64, 130)

    def products() -> list[Tensor]:
        y = kernels.empty(64, 130, x, feature_major=True)
        kernels.multiply(values, structure.by_row, x, y)
        return [y, kernels.permute(values, structure.order), kernels.weight_gradient(structure.by_row, x, dy)]

    if kernels._kernel("rarefy_train_forward") is None:
        pytest.skip("torch makes no such promise of its own products")
    before = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(products())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_cannot_be_walked_is_copied() -> None:
    row = torch.arange(3.0)
    for odd in (row.expand(4, 3), torch.ones(()).expand(4, 3), torch.zeros(8, 6)[::2, ::2]):
        assert kernels.walkable(odd).is_contiguous()
    plain = torch.zeros(4, 3)
    assert kernels.walkable(plain) is plain
    assert kernels.walkable(turned := torch.zeros(3, 4).t()) is turned
