"""A benchmark's results: the document, its Markdown beside it, and the same on the terminal."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from rarefy.bench.files import write_whole

__all__ = ["publish"]


def publish(path: Path, document: Mapping[str, Any], text: str, *shown: RenderableType, width: int = 160) -> None:
    """Write `document` to `path` as JSON and `text` beside it as Markdown; print `shown`, and where these are.

    width: of what is printed where it is no terminal.
    """
    write_whole(path, (json.dumps(document, indent=1) + "\n").encode())
    write_whole(path.with_suffix(".md"), text.encode())
    console = Console(width=None if sys.stdout.isatty() else width)
    console.print(*shown, sep="\n", markup=False, highlight=False)
    console.print(f"Written to {path} and {path.with_suffix('.md')}.", markup=False, highlight=False)
