"""The command line: `rarefy demo | methods | bench | report`.

Results and tables go to the output stream, with `--json` as one JSON document; progress and problems go to the error
stream. A mistake of the user is one line there and exit code 2; runs that failed are exit code 1.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

__all__ = ["main"]

_MISSING = "the command line needs rich and tyro: pip install 'rarefy[cli]'"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, by default that of the process, and exit."""
    try:
        import rich  # noqa: F401
        import tyro
    except ModuleNotFoundError:
        _fail(_MISSING)
    commands = {"demo": _annotated(demo), "methods": _annotated(methods), "bench": _annotated(bench), "report": _annotated(report)}
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            commands, prog="rarefy", description="Sparse networks: make them, compare them.", args=argv
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("RAREFY_TRACEBACK"):
            raise
        _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)
