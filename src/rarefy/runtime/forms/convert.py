"""From one form to another: the smallest for a file, the one that a kernel reads for running."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from rarefy.runtime.forms.encode import encode, rebuild
from rarefy.runtime.forms.header import MAX_COLS, AnyForm, FileForm, Header
from rarefy.runtime.forms.places import FullPanelError, starts_of
from rarefy.runtime.forms.stored import Stored
from rarefy.runtime.kernels import Form


def convert(stored: Stored, form: AnyForm, block: int | None = None) -> Stored:
    """The same weight and mask in another form; `stored` itself where it is in that form. block: by default as it is,
    where the form has blocks, else 1.

    To DENSE the mask is given up, and values that are not kept become entries that are zero.

    >>> import torch
    >>> stored = encode(torch.eye(3))
    >>> convert(stored, Form.INDEX16).index.view(torch.int16).tolist()
    [0, 1, 2]
    """
    if block is None:
        block = stored.block if form in (Form.INDEX16, FileForm.PANEL8) else 1
    if (form, block) == (stored.form, stored.block):
        return stored
    if form == Form.LUT:
        return convert(stored, stored.form if stored.form == Form.INDEX16 else Form.BITMAP, 1).looked_up()
    if stored.form == Form.LUT:
        return convert(stored.opened(), form, block)
    if block == stored.block and Form.DENSE not in (form, stored.form):
        return rebuild(stored, form)
    mask = None if form == Form.DENSE else stored.mask()
    return encode(stored.entries(), mask=mask, form=form, block=block, scales=stored.scales)


def runnable(stored: Stored, form: Form, block: int | None = None) -> Stored:
    """`convert` to a form that kernels read."""
    return convert(stored, form, block)


def smallest(stored: Stored) -> Stored:
    """The form for a file, the smaller of BITMAP and PANEL8; DENSE stays as it is.

    PANEL8 keeps the block; BITMAP has none, so whoever wants the blocks back keeps their size beside it.

    >>> import torch
    >>> many, few = torch.ones(64, 64).triu(), torch.zeros(8, 512)
    >>> few[:, 7] = 1
    >>> smallest(encode(many)).form.name, smallest(encode(few)).form.name
    ('BITMAP', 'PANEL8')
    """
    if stored.form == Form.DENSE:
        return stored
    stored = stored.opened()
    old = stored.header
    panels = replace(old, form=FileForm.PANEL8)
    if old.cols <= MAX_COLS and sum(panels.lengths()[:2]) < sum(_bitmap(stored).lengths()[:2]):
        with suppress(FullPanelError):
            return convert(stored, FileForm.PANEL8)
    return convert(stored, Form.BITMAP)


def _bitmap(stored: Stored) -> Header:
    """The header of the weight as BITMAP: rows of a block that are past the end are not stored in it."""
    old = stored.header
    beyond = old.block_rows * old.block - old.rows
    last = 0
    if beyond:
        starts = stored.first_units() if stored.starts is not None else starts_of(old, stored.index.numpy())
        last = int(starts[-1] - starts[-2])
    return replace(old, form=Form.BITMAP, block=1, units=old.units * old.block - last * beyond)
