"""`python -m rarefy.bench.language train OUT`: the language model that pruning is judged on."""

import json
from pathlib import Path

import tyro

from rarefy.bench.language.corpus import standard_library
from rarefy.bench.language.train import Recipe
from rarefy.bench.language.train import train as run
from rarefy.bench.progress import tracked


def train(out: tyro.conf.Positional[Path], minutes: float = 50.0, threads: int = 2) -> None:
    """Train the model on the standard library's source and write it to OUT.

    Args:
        out: a folder that is not there yet, or empty.
        minutes: how long to train.
        threads: of the processor.
    """
    import torch

    torch.set_num_threads(threads)
    with tracked("training") as progress:
        said = run(standard_library(), out, Recipe(minutes=minutes), progress)
    print(json.dumps(said, indent=1))  # noqa: T201


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": train, "corpus": lambda: print(standard_library().digest())})  # noqa: T201
