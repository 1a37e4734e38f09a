"""What the tests of damage share: a weight in every form, and what kernels rely on."""

from itertools import pairwise

import numpy as np
import torch

from rarefy.runtime.forms import FileForm, Stored, encode, from_bytes, quantize
from rarefy.runtime.kernels import DType, Form, available

KINDS = [
    (Form.DENSE, 1), (Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, 4), (FileForm.PANEL8, 1), (FileForm.PANEL8, 8),
    *([(Form.LUT, 1)] if available() else []),
]  # fmt: skip


def example(form: Form | FileForm, block: int, dtype: torch.dtype = torch.bfloat16) -> Stored:
    """10 × 300 with a quarter kept: ragged rows, words and panels."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(10, 300, generator=generator)
    weight[torch.rand(10, 300, generator=generator) > 0.25] = 0
    if dtype == torch.int8:
        values, scales = quantize(weight)
        return encode(values, form=form, block=block, scales=scales)
    return encode(weight.to(dtype), form=form, block=block)


def safe(stored: Stored) -> bool:
    """What kernels rely on, one unit after the other, in plain Python."""
    header, data = stored.header, stored.bytes.numpy()
    places = header.offsets()
    assert places[-1] == len(data)
    assert all(place % 64 == 0 and place <= len(data) for place in places)
    block_rows = -(-header.rows // header.block)
    if header.form == Form.DENSE:
        return header.units == header.rows * header.cols
    if header.form == FileForm.PANEL8:
        panels = -(-header.cols // 256)
        counts = data[128 : 128 + block_rows * panels].reshape(block_rows, panels)
        inside = iter(data[128 + block_rows * panels :][: header.units].tolist())
        rows = [[256 * p + next(inside) for p in range(panels) for _ in range(row[p])] for row in counts.tolist()]
        return sum(map(len, rows)) == header.units and all(ascending(row, header.cols) for row in rows)
    if header.form == Form.LUT:
        return safe_look_up(stored)
    starts = stored.starts.numpy().view(np.uint32).tolist()
    if starts[0] != 0 or starts[-1] != header.units or sorted(starts) != starts or len(starts) != block_rows + 1:
        return False
    if header.form == Form.BITMAP:
        words = -(-header.cols // 64) * 64
        bitmap = np.unpackbits(data[128:][: header.rows * words // 8], bitorder="little").reshape(header.rows, words)
        return bool((bitmap.sum(1) == np.diff(starts)).all()) and not bitmap[:, header.cols :].any()
    columns = data[128:][: 2 * header.units].view(np.uint16).tolist()
    return all(ascending(columns[a:b], header.cols) for a, b in pairwise(starts))


def safe_look_up(stored: Stored) -> bool:
    """Slices of 16 rows list their panels, most steps first; a step has some columns of each row, 0x80 fills up."""
    header = stored.header
    panel, depth = (32, 1) if header.dtype == DType.F32 else (64, 2 if header.dtype == DType.BF16 else 4)
    slices, panels = -(-header.rows // 16), -(-header.cols // panel)
    starts = stored.starts.numpy().view(np.uint32).tolist()
    listed = -(-slices * (panels + 1) * 4 // 64) * 64
    lists = stored.index.numpy()[: slices * (panels + 1) * 4].view([("panel", "<u2"), ("steps", "u1"), ("zero", "u1")])
    columns = stored.index.numpy()[listed:].reshape(-1, 16, depth)
    if starts[0] != 0 or starts[-1] != header.steps or len(starts) != slices + 1 or len(columns) != header.steps:
        return False
    units = 0
    for at, entries in enumerate(lists.reshape(slices, panels + 1)):
        used = entries[entries["steps"] > 0]
        first = starts[at]
        if sorted(used["steps"], reverse=True) != list(used["steps"]) or len(set(used["panel"])) != len(used):
            return False
        if (entries[: len(used)] != used).any() or entries["zero"].any() or (used["panel"] >= panels).any():
            return False
        for here in used:
            width = min(panel, header.cols - panel * int(here["panel"]))
            rows = columns[first : first + here["steps"]].transpose(1, 0, 2).reshape(16, -1)
            first += int(here["steps"])
            for row in rows.tolist():
                kept = [c for c in row if c != 0x80]
                if row[: len(kept)] != kept or not ascending(kept, width):
                    return False
                units += len(kept)
        if first != starts[at + 1]:
            return False
    return units == header.units


def ascending(columns: list[int], below: int) -> bool:
    return sorted(set(columns)) == columns and all(column < below for column in columns)


def read_or_refuse(data: torch.Tensor) -> bool:
    """Whether it was refused; what is not is safe and can be unpacked."""
    try:
        stored = from_bytes(data)
    except ValueError:
        return True
    assert safe(stored)
    stored.dense()
    stored.mask()
    return False
