"""Wanda: pruning by weights and activations.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv:2306.11695.

    S_rc = |W_rc| · ‖X_c‖₂,   compared within each output row; no weight is updated

In the code: ‖X_c‖² = `statistics.squares`, of inputs made by the blocks pruned so far.

Deviations from the authors' code: each row keeps floor((1 − s)·in + ½) weights (theirs drops int(s·in)); the norms are
float64 sums over all tokens (theirs: float32 means over sequences; constants cancel); n:m names what is kept.
"""

from typing import Literal

import torch
from torch import Tensor

from rarefy.axes import value
from rarefy.core.method import register
from rarefy.methods.one_shot.layerwise import Pruner
from rarefy.methods.one_shot.matrix import Matrix, Solved, choose_mask, rows_at_once


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W|·‖X_c‖, in the weight's dtype.

    weight: (out, in), floating. squares: (in,), Σ x² of each input over all tokens, ≥ 0; any positive multiple ranks
    alike.

    >>> import torch
    >>> wanda_scores(torch.tensor([[4.0, -1.0, 2.0]]), torch.tensor([0.01, 4.0, 1.0]))
    tensor([[0.4000, 2.0000, 2.0000]])
    """
    return weight.abs().mul_(squares.sqrt().to(weight.dtype))


@register
@value
class Wanda(Pruner):
    """Args:
    group: "row" compares the weights of each output (of each row of tiles, for blocks); "layer" all of the matrix.
    See `Pruner` for the others. Needs `data`.

    >>> Wanda(0.5).to_dict()["group"]
    'row'
    """

    group: Literal["row", "layer"] = "row"

    paper = "Sun et al. 2023, arXiv:2306.11695"
    extra_cost = "two forward passes over the calibration data"

    def solve(self, matrix: Matrix) -> Solved:
        """The mask alone."""
        squares, weight = matrix.statistics.squares, matrix.weight
        masks = [
            choose_mask(
                wanda_scores(rows, squares), matrix.pattern, matrix.keep * len(rows) // len(weight), matrix.sparsity,
                self.group, matrix.line,
            )
            for rows in weight.split(rows_at_once(weight, matrix.pattern, self.group))
        ]  # fmt: skip
        return Solved(masks[0] if len(masks) == 1 else torch.cat(masks))
