"""Compressed rows and their transposed, against numpy and scipy; what no structure is is refused."""

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rarefy.core import bits
from rarefy.core.sparse.structure import Compressed, Structure


def random_mask(rows: int, cols: int, density: float, seed: int) -> Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 99))
def test_both_orders_are_scipys(rows: int, cols: int, density: float, seed: int) -> None:
    mask = random_mask(rows, cols, density, seed)
    structure = Structure.of_mask(mask)
    ordered = scipy.sparse.csr_matrix(mask.numpy(), dtype=np.int64)
    ordered.data = np.arange(ordered.nnz)
    for mine, theirs in ((structure.by_row, ordered), (structure.by_column, ordered.T.tocsr())):
        theirs.sort_indices()
        assert (mine.rows, mine.cols) == theirs.shape
        assert mine.columns.tolist() == theirs.indices.tolist()
        assert mine.starts.tolist() == theirs.indptr.tolist()
    transposed = ordered.T.tocsr()
    transposed.sort_indices()
    assert structure.order.tolist() == transposed.data.tolist()
    assert torch.equal(structure.mask(), mask)
    assert torch.equal(structure.bits(), bits.pack(mask))
    again = Structure.of_columns(structure.by_row.columns, structure.by_row.starts, rows, cols)
    assert again.same_as(structure)
    assert torch.equal(again.order, structure.order)


def test_the_largest_indices_of_16_bits() -> None:
    mask = torch.zeros(3, 65536, dtype=torch.bool)
    mask[1, 65535] = mask[2, 0] = True
    for each in (mask, mask.t().contiguous()):
        assert torch.equal(Structure.of_mask(each).mask(), each)


def test_index_bytes_per_non_zero() -> None:
    structure = Structure.of_mask(random_mask(500, 700, 0.1, 0))
    assert structure.nbytes() == 8 * structure.nonzeros + 4 * (500 + 1 + 700 + 1)


@given(st.integers(1, 300), st.integers(1, 300))
def test_chunks_cover_every_row_once_and_never_the_whole(rows: int, cols: int) -> None:
    chunks = list(Compressed(rows, cols, torch.zeros(0), torch.zeros(0)).chunks())
    assert [row for first, last in chunks for row in range(first, last)] == list(range(rows))
    assert len(chunks) >= min(rows, 3)


def test_chunks_of_a_large_matrix_are_small() -> None:
    matrix = Compressed(4096, 4096, torch.zeros(0), torch.zeros(0))
    assert max((last - first) * 4096 for first, last in matrix.chunks()) <= 1 << 20


def test_expanding_rows() -> None:
    mask = random_mask(9, 7, 0.4, 1)
    structure = Structure.of_mask(mask)
    dense = torch.randn(9, 7).masked_fill(~mask, 0.0)
    assert torch.equal(structure.by_row.expand(dense[mask], 2, 6), dense[2:6])
    assert torch.equal(structure.by_column.expand(dense[mask][structure.order.long()], 0, 7), dense.t())


def test_another_structure_is_written_in_place() -> None:
    one, other = (Structure.of_mask(torch.eye(4, dtype=torch.bool).roll(k, 1)) for k in (0, 1))
    columns, order = one.by_row.columns, one.order
    one.become(other)
    assert one.by_row.columns is columns
    assert one.order is order
    assert one.same_as(other)
    one.become(Structure.of_mask(torch.ones(4, 4, dtype=torch.bool)))
    assert one.nonzeros == 16


@pytest.mark.parametrize(
    ("columns", "starts", "message"),
    [
        ([0, 1, 2], [0, 2], "3 numbers"),
        ([0, 1, 2], [0, 2, 4], "rise from 0 to 3"),
        ([0, 1, 2], [1, 2, 3], "rise from 0 to 3"),
        ([0, 1, 2], [0, 4, 3], "rise from 0 to 3"),
        ([0, 5, 2], [0, 2, 3], "from 0 to 2"),
        ([0, -1, 2], [0, 2, 3], "from 0 to 2"),
        ([1, 0, 2], [0, 2, 3], "must ascend"),
        ([1, 1, 2], [0, 2, 3], "must ascend"),
    ],
)
def test_what_is_no_structure_is_refused(columns: list[int], starts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Structure.of_columns(torch.tensor(columns), torch.tensor(starts), 2, 3)


def test_what_is_no_vector_of_whole_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        Structure.of_columns(torch.zeros(3), torch.tensor([0, 2, 3]), 2, 3)
    with pytest.raises(ValueError, match="whole numbers"):
        Structure.of_columns(torch.tensor([[0, 1, 2]]), torch.tensor([0, 2, 3]), 2, 3)
