"""`Stored`: a weight in a stored form, and the way from bytes that were read to one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.axes.top_k import from_array
from rarefy.runtime.forms import decode, lut
from rarefy.runtime.forms.header import SIZE, FileForm, Header
from rarefy.runtime.forms.sections import Sections, aligned, from_bits, starts_tensor
from rarefy.runtime.forms.validate import checked_starts
from rarefy.runtime.kernels import Form, Weight


@dataclass(frozen=True, eq=False)
class Stored(Sections):
    """A weight [rows, cols] in a stored form. Made by `encode` and `from_bytes`; its memory is never written again.

    >>> from rarefy.runtime.forms import encode
    >>> stored = encode(torch.eye(3))
    >>> stored.form.name, stored.shape, stored.units, stored.dtype.name
    ('BITMAP', (3, 3), 3, 'F32')
    >>> stored.mask().sum(dim=1)
    tensor([1, 1, 1])
    """

    def dense(self) -> Tensor:
        """The weight, a fresh tensor [rows, cols] of its dtype; int8: scale × value, float32.

        What is not kept is +0.0.
        """
        values = self.entries()
        return values if self.scales is None else values.to(torch.float32) * self.scales[:, None]

    def entries(self) -> Tensor:
        """The weight as it is stored, a fresh tensor [rows, cols]: as `dense()`, int8 without its scales."""
        return from_bits(decode.entries(self.opened()), self.dtype)

    def mask(self) -> Tensor:
        """Which entries are kept, a fresh bool [rows, cols]: whole units, whatever their values. DENSE keeps all."""
        return from_array(decode.mask(self.opened()))

    def opened(self) -> Stored:
        """LUT as a bitmap, whose units can be read one by one; another form itself."""
        return Stored(*lut.bitmap(self, self.weight())) if self.form == Form.LUT else self

    def looked_up(self) -> Stored:
        """A form without blocks as LUT. Raises ValueError where there is none, or no kernels that make it."""
        header, data = lut.build(self.header, self.weight())
        return Stored(header, data, _inside(header, data))

    def weight(self) -> Weight:
        """What kernels take: pointers into this form, which the caller keeps alive. Not for PANEL8.

        Raises ValueError for a form that no kernel reads.
        """
        if isinstance(self.form, FileForm):
            raise ValueError(f"{self.form.name} lies in files; runnable(stored, Form.INDEX16) makes what kernels read")
        return Weight(
            self.form, self.dtype, self.block, 0, *self.shape, self.units,
            self.index.data_ptr() if self.form != Form.DENSE else None,
            self.values.data_ptr(),
            None if self.starts is None else self.starts.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
        )  # fmt: skip

    def with_starts(self, starts: Tensor | None) -> Stored:
        """The same form with these starts: in the bytes where the form stores them, else beside them."""
        if self.form != Form.INDEX16 or starts is None:
            return Stored(self.header, self.bytes, starts)
        inside = _inside(self.header, self.bytes)
        assert inside is not None
        return Stored(self.header, self.bytes, inside.copy_(starts))


def from_bytes(data: Tensor) -> Stored:
    """The form that bytes hold, on the same memory where that begins at a multiple of 64 bytes, else on a copy.

    data: uint8, 1-D, contiguous, on the CPU. Every size, offset, count and column is checked, so that a kernel that
    runs the form stays within it. Raises ValueError where anything is off.

    >>> from rarefy.runtime.forms import encode
    >>> from_bytes(encode(torch.eye(3)).bytes).units
    3
    """
    if data.dtype != torch.uint8 or data.ndim != 1 or not data.is_contiguous() or data.device.type != "cpu":
        raise ValueError(
            "a stored weight is a contiguous 1-D uint8 tensor on the CPU; "
            f"got {data.dtype} {tuple(data.shape)} on {data.device}"
        )
    header = Header.unpack(data[:SIZE].numpy().tobytes())
    if data.numel() != header.offsets()[-1]:
        raise ValueError(f"{header} takes {header.offsets()[-1]} bytes; got {data.numel()}: it is cut short or damaged")
    data = aligned(data)
    stored = Stored(header, data, _inside(header, data))
    if header.form == Form.LUT:
        lut.check(stored.weight(), header)
        return stored
    starts = checked_starts(stored)
    return stored if header.form != Form.BITMAP else Stored(header, data, starts_tensor(starts))


def _inside(header: Header, data: Tensor) -> Tensor | None:
    """The starts that the bytes hold: INDEX16 and LUT only."""
    if header.form not in (Form.INDEX16, Form.LUT):
        return None
    first, length = header.offsets()[3], header.lengths()[3]
    return data[first : first + length].view(torch.int32)
