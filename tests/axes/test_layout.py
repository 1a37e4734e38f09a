"""Layout: a row of the canonical weight is what reaches one output, whatever module stores it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy.axes.layout import Layout

SETTINGS = settings(deadline=None, max_examples=50, derandomize=True)
dims = st.integers(1, 4)


def transposed(groups: int, inputs: int, outputs: int, kernel: int) -> tuple[nn.ConvTranspose2d, Layout]:
    module = nn.ConvTranspose2d(groups * inputs, groups * outputs, kernel, groups=groups, bias=False)
    nn.init.uniform_(module.weight, 0.5, 1.0, generator=torch.Generator().manual_seed(0))
    return module, Layout(transposed=True, groups=groups)


@SETTINGS
@given(dims, dims, dims, st.integers(1, 3), st.sampled_from([torch.float32, torch.bool, torch.bfloat16]))
def test_round_trip(groups: int, inputs: int, outputs: int, kernel: int, dtype: torch.dtype):
    module, layout = transposed(groups, inputs, outputs, kernel)
    weight = (module.weight.detach() > 0.7).to(dtype)
    canonical = layout.canonical(weight)
    assert canonical.shape == (groups * outputs, inputs, kernel, kernel)
    assert torch.equal(layout.restore(canonical), weight)
    assert torch.equal(layout.canonical(layout.restore(canonical)), canonical)


def reached(module: nn.Module, channels: int) -> Tensor:
    """Outputs that are not all zero for an input of ones."""
    return module(torch.ones(1, channels, 3, 3)).abs().amax((0, 2, 3)) > 0


@SETTINGS
@given(dims, dims, dims, st.data())
def test_a_row_is_what_reaches_one_output(groups: int, inputs: int, outputs: int, data: st.DataObject):
    module, layout = transposed(groups, inputs, outputs, 3)
    row = data.draw(st.integers(0, groups * outputs - 1))
    canonical = layout.canonical(module.weight.detach()).clone()
    canonical[row] = 0
    module.weight.data = layout.restore(canonical)
    assert (~reached(module, groups * inputs)).nonzero().flatten().tolist() == [row]


@SETTINGS
@given(dims, dims, dims, st.data())
def test_a_column_is_one_input_of_its_group(groups: int, inputs: int, outputs: int, data: st.DataObject):
    # Zero the canonical entries of one input channel; then the module no longer depends on it, and on that alone.
    module, layout = transposed(groups, inputs, outputs, 3)
    channel = data.draw(st.integers(0, groups * inputs - 1))
    group, column = divmod(channel, inputs)
    canonical = layout.canonical(module.weight.detach()).clone()
    canonical[group * outputs : (group + 1) * outputs, column] = 0
    module.weight.data = layout.restore(canonical)
    x = torch.ones(1, groups * inputs, 3, 3, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax((0, 2, 3)) == 0).nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.Conv2d(4, 2, 3, groups=2), nn.Embedding(5, 3)])
def test_other_modules_are_stored_canonically(module: nn.Module):
    weight = module.get_parameter("weight")
    assert Layout().canonical(weight) is weight
    assert Layout().restore(weight) is weight


def test_one_group_is_a_view():
    weight = torch.zeros(2, 3, 1)
    Layout(transposed=True).canonical(weight)[2, 1] = 1
    assert weight[1, 2] == 1


@SETTINGS
@given(dims, dims, dims, st.booleans())
def test_stacked_matrices_lie_one_after_the_other(stacked: int, rows: int, columns: int, inputs_first: bool):
    layout = Layout(transposed=inputs_first, stacked=stacked)
    matrices = torch.arange(stacked * rows * columns).view(stacked, rows, columns)
    stored = matrices.mT.contiguous() if inputs_first else matrices
    canonical = layout.canonical(stored)
    assert torch.equal(canonical, torch.cat(list(matrices)))
    assert torch.equal(layout.restore(canonical), stored)


def test_errors_of_stacked_matrices():
    with pytest.raises(ValueError, match=r"stacked must be 0 or more"):
        Layout(stacked=-1)
    with pytest.raises(ValueError, match=r"have no groups"):
        Layout(groups=2, stacked=3)
    with pytest.raises(ValueError, match=r"3 dimensions with 2 matrices along the first; got shape \(3, 4, 5\)"):
        Layout(stacked=2).canonical(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"2 dimensions with 2 matrices along the first; got shape \(3, 4\)"):
        Layout(stacked=2).restore(torch.zeros(3, 4))


def test_errors_name_shape_and_groups():
    with pytest.raises(ValueError, match=r"groups must be at least 1"):
        Layout(groups=0)
    with pytest.raises(ValueError, match=r"groups=2.* multiple of 2 .* got shape \(3, 2\)"):
        Layout(transposed=True, groups=2).canonical(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"at least 2 dimensions"):
        Layout(transposed=True).canonical(torch.zeros(3))


def test_layouts_compare_by_value():
    assert Layout(True, 2) == Layout(True, 2) != Layout(True)
    assert hash(Layout(True, 2)) == hash(Layout(True, 2))
