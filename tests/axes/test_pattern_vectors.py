"""Patterns: vectors that a reader can check by hand."""

import pytest
import torch

from rarefy.axes.pattern import NM, Block, Channel, ConstantFanIn, Unstructured


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NM(2, 4), [0, 1, 1, 0, 1, 0, 0, 1]),  # the tie |1| = |-1| goes to the earlier
        (NM(1, 4), [0, 1, 0, 0, 0, 0, 0, 1]),
        (NM(2, 8), [0, 0, 0, 0, 1, 0, 0, 1]),  # positions 4 and 7
    ],
    ids=str,
)
def test_nm_of_the_handbook(pattern: NM, expected: list[int]):
    weight = torch.tensor([[0.1, -0.4, 0.3, 0.2, 1.0, -1.0, 0.5, 2.0]])
    assert pattern.project(weight, 0).int().tolist() == [expected]


def test_nm_keeps_the_earlier_of_equals():
    assert NM(2, 4).project(torch.ones(1, 4), 0).int().tolist() == [[1, 1, 0, 0]]
    assert NM(1, 2).project(torch.tensor([[-0.0, 0.0], [0.0, -0.0]]), 0).int().tolist() == [[1, 0], [1, 0]]


def test_nm_of_a_conv_runs_along_input_channels():
    weight = torch.zeros(1, 4, 1, 2)  # kernel position 0 likes inputs 0 and 3, position 1 likes inputs 1 and 2
    weight[0, [0, 3], 0, 0] = 1
    weight[0, [1, 2], 0, 1] = 1
    assert NM(2, 4).project(weight, 0)[0, :, 0].int().tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]


def test_nm_keeps_ceil_of_a_short_group():
    assert NM(2, 4).project(torch.ones(2, 7), 0).int().tolist() == [[1, 1, 0, 0, 1, 1, 0]] * 2
    assert NM(2, 4).asked((64, 27, 3, 3)) == 64 * 9 * (6 * 2 + 2)
    assert NM(1, 4).asked((5, 3)) == 5


def test_nm_legal_means_exactly_n():
    rows = {(1, 1, 0, 0): True, (1, 0, 0, 0): False, (1, 1, 1, 0): False, (1, 1, 0, 0, 1, 0): True}
    for row, legal in rows.items():
        assert NM(2, 4).legal(torch.tensor([row]).bool()) is legal


def test_block_edges_are_smaller_tiles_scored_by_their_own_mean():
    weight = torch.tensor([[1.0, 1.0, 3.0], [1.0, 1.0, 3.0], [2.0, 2.0, 9.0]])
    assert Block(2, 2).pool(weight).tolist() == [1.0, 3.0, 2.0, 9.0]
    assert Block(2, 2).project(weight, 2).int().tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 1]]


def test_block_of_a_conv_tiles_the_out_by_in_kernel_matrix():
    weight = torch.zeros(2, 2, 1, 2)
    weight[:, 1] = 1
    assert Block(2, 2).pool(weight).tolist() == [0.0, 1.0]


def test_pooling_signed_saliencies():
    weight = torch.tensor([[1.0, -4.0], [3.0, -3.0]])
    assert Channel().pool(weight, "mean_abs").tolist() == [2.5, 3.0]
    assert Channel().pool(weight, "abs_mean").tolist() == [1.5, 0.0]
    assert Channel().pool(weight, "mean").tolist() == [-1.5, 0.0]
    assert Unstructured().pool(weight, "mean").tolist() == [1.0, -4.0, 3.0, -3.0]


def test_constant_fan_in_counts_and_legality():
    assert ConstantFanIn().asked((3, 5), 0.5) == 6  # 8 asked, 2 for each of 3 rows
    assert ConstantFanIn().legal(torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]]).bool())  # an ablated row
    assert not ConstantFanIn().legal(torch.tensor([[1, 0, 1], [0, 1, 0]]).bool())


def test_channel_and_block_legality():
    assert Channel().legal(torch.tensor([[1, 1], [0, 0]]).bool())
    assert not Channel().legal(torch.tensor([[1, 0], [0, 0]]).bool())
    assert not Block(2, 2).legal(torch.eye(2).bool())
    assert not Block(4, 4).legal(torch.eye(2).bool())
    assert Unstructured().legal(torch.eye(2).bool())
