"""Quantisation to int8, one scale a row: an explicit step before a weight is stored."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 values in [−127, 127] and the scales of rows, symmetric: scale = max|row| / 127, value = round(w / scale).

    weight: [rows, cols], floating, finite. mask: bool [rows, cols]; entries outside it become 0. A row of zeros has
    scale 1. Halves are rounded to even. A kept weight may become 0: keep the mask, and give it to `encode`.
    Returns (int8 [rows, cols], float32 [rows]). Raises ValueError on NaN, infinities and other shapes.

    >>> quantize(torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]))
    (tensor([[  64, -127,    0],
            [   0,    0,    0]], dtype=torch.int8), tensor([0.0157, 1.0000]))
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"quantize takes a floating matrix [rows, cols]; got {weight.dtype} {tuple(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("quantize takes finite weights; got NaN or an infinity, which no int8 scale can hold")
    exact = weight.detach().to(torch.float32)
    if mask is not None:
        exact = exact.masked_fill(~mask, 0)
    scales = exact.abs().amax(dim=1) / 127 if exact.numel() else exact.new_ones(len(exact))
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (exact / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return values, scales
