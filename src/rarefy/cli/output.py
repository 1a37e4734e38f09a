"""What all commands share: the `--json` switch, the console, and numbers as tables write them."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import rich.console
import rich.table
import rich.text
import tyro

__all__ = ["AsJson", "amount", "console", "grid", "print_json", "share"]

AsJson = Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff]


def console() -> rich.console.Console:
    """Wide where nobody's terminal says how wide, so that no line of a file is broken."""
    found = rich.console.Console()
    return found if found.is_terminal else rich.console.Console(width=200)


def print_json(content: Any) -> None:
    """One document on the output stream."""
    print(json.dumps(content, indent=1, ensure_ascii=False))


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> rich.table.Table:
    """A table without frames; the first `left` columns are words, the others numbers. A row of "" is a gap."""
    table = rich.table.Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(rich.text.Text, row))
    return table


def amount(count: int) -> str:
    """Bytes, in decimal units.

    >>> amount(1_040_128), amount(512)
    ('1.04 MB', '512 B')
    """
    if count < 1000:
        return f"{count} B"
    power = min(3, int(math.log10(count)) // 3)
    return f"{count / 1000**power:.3g} {'kMG'[power - 1]}B"


def share(part: int, whole: int) -> str:
    """A share of the whole in per cent; – of nothing.

    >>> share(1, 8)
    '12.50 %'
    """
    return f"{100 * part / whole:.2f} %" if whole else "–"
