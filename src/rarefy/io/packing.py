"""Which weights gain by being packed in a file, and how they are stored there."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from rarefy.core import bits
from rarefy.io.weights import PackedEntry
from rarefy.runtime.find import blocks_of
from rarefy.runtime.forms import FileForm, Header, Stored, encode, smallest
from rarefy.runtime.forms.header import MAX_COLS
from rarefy.runtime.kernels import DType, Form

_HELD_AS: Final = {
    torch.float32: (torch.float32, DType.F32), torch.bfloat16: (torch.bfloat16, DType.BF16),
    torch.float16: (torch.float32, DType.F32),
}  # fmt: skip
"""What holds the weights of a dtype without loss."""


def reason_against(weight: Tensor) -> str | None:
    """Why a Linear weight [rows, cols] stays dense; None where its packed bytes are fewer and give the same again."""
    if weight.dtype not in _HELD_AS:
        return f"packed layers hold float32, bfloat16 and float16, not {weight.dtype}"
    if not weight.numel():
        return "it has no entries"
    rows, cols = weight.shape
    kept = int(weight.count_nonzero())
    least = Header(Form.BITMAP, _HELD_AS[weight.dtype][1], 1, rows, cols, kept).offsets()[-1]
    before = weight.numel() * weight.element_size()
    if least >= before:
        return f"with {kept} of {weight.numel()} weights kept it would take {least} bytes in place of {before}"
    if bits.count(weight.eq(0)) != bits.count(bits.as_bits(weight).eq(0)):
        return "it has a −0.0, which packed forms store as +0.0"
    return None


def pack_weight(module: str, weight: Tensor, bias: torch.dtype | None) -> tuple[Stored, PackedEntry]:
    """A weight [rows, cols] in its smallest form, and what is said of the layer, which the model calls `module`.

    It will run in blocks of rows where its zeros lie so, with 16-bit columns where few weights are kept, else as a
    bitmap: no machine is asked which is fastest.
    """
    held = weight.detach().to(_HELD_AS[weight.dtype][0])
    block = max(blocks_of(held.ne(0)))
    if block > 1 and held.shape[1] <= MAX_COLS:
        stored = encode(held, form=Form.INDEX16, block=block)
        return smallest(stored), PackedEntry.of(module, stored, weight.dtype, bias)
    file = smallest(encode(held))
    entry = PackedEntry.of(module, file, weight.dtype, bias)
    return file, entry.model_copy(update={"form": int(Form.INDEX16)}) if file.form == FileForm.PANEL8 else entry
