"""The command line: `rarefy demo | bench | methods | report | prune | eval | speed | essential | unpack | check`.

compare      demo, bench, methods, report: methods against each other on a task
prune        prune: a model directory made sparse, without training
directories  eval, unpack, check: what a model directory is worth, made dense again, proved
essential    essential: how much can be removed before quality turns, with a plot
speed        speed: dense against packed on this machine

Tables go to the output stream, or with `--json` one JSON document; progress and problems go to the error stream. A
mistake of the user is one line there and exit code 2 (RAREFY_TRACEBACK=1 shows where it was raised); runs that failed
are exit code 1.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

try:
    import rich.console  # noqa: F401  asked for here, where it can be said what is missing
    import tyro
except ModuleNotFoundError as missing:
    sys.stderr.write(f"rarefy: the command line needs {missing.name}: pip install 'rarefy[cli]'\n")
    raise SystemExit(2) from missing

from rarefy.cli.compare import bench, demo, methods, report
from rarefy.cli.directories import check, evaluate, unpack
from rarefy.cli.essential import essential
from rarefy.cli.prune import prune
from rarefy.cli.speed import speed

__all__ = ["main"]

_COMMANDS = {
    "demo": demo,
    "methods": methods,
    "bench": bench,
    "prune": prune,
    "eval": evaluate,
    "speed": speed,
    "essential": essential,
    "unpack": unpack,
    "check": check,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command in `argv`, by default the process's own, and exit with its code."""
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            _COMMANDS, prog="rarefy", description="Sparse networks: make them, compare them, run them.", args=argv
        )
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("RAREFY_TRACEBACK"):
            raise
        sys.stderr.write(f"rarefy: {' '.join(str(error).split())}\n")
        code = 2
    except KeyboardInterrupt:
        given = list(sys.argv[1:] if argv is None else argv)
        goes_on = given[:1] in (["demo"], ["bench"])
        what = "finished runs are kept, and the same command goes on from there" if goes_on else "nothing was written"
        sys.stderr.write(f"rarefy: stopped; {what}\n")
        code = 130
    raise SystemExit(code)
