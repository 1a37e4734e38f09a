"""One JSON file per run, with the sections run, method, train and environment; what is not exactly that is no result.

A file's name ends in the key of its run, a hash of everything that decides its numbers, and the key is computed again
from the content when it is read. So a file that is truncated, edited or from elsewhere is told apart and run again.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rarefy.bench.environment import Environment
from rarefy.bench.files import write_whole

__all__ = ["CONTROLS", "Control", "Flops", "Result", "RunSection", "TrainSection", "key_of", "load_results"]

FORMAT = "rarefy.bench/1"

Control = Literal["none", "shuffled", "reinitialised", "extended", "small_dense"]
CONTROLS: tuple[Control, ...] = ("shuffled", "reinitialised", "extended", "small_dense")

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Unknown fields, other types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """What was asked for. `steps` = batches of one training run; `data` = hash of the images and their split."""

    task: dict[str, Any]
    name: Text
    sparsity: Annotated[float, Field(ge=0, lt=1)]
    seed: Annotated[int, Field(ge=0)]
    control: Control
    steps: Positive
    judge: Literal["test", "validation"]
    data: Text


class Flops(Section):
    """`formula` names the convention that `text` spells out. inference: of one image; training: of all steps."""

    formula: Text
    text: Text
    inference: float
    inference_dense: float
    training: float
    training_dense: float
    scoring: float
    """The part of `training` that was spent on choosing masks before training."""


class TrainSection(Section):
    """What came out. Accuracies in percent; counts are of mask entries, never of values that happen to be zero."""

    accuracy: Annotated[float, Field(ge=0, le=100)]
    judged: Positive
    """Number of images that the accuracy is of."""
    labels: Annotated[list[Text], Field(min_length=1)]
    sites: Text
    """Hash of the list of tensors that may be sparse."""
    prunable: Positive
    nonzeros: Positive
    kept: dict[str, int]
    parameters: Positive
    parameters_nonzero: Positive
    bytes: Positive
    """4 per non-zero parameter + 1 bit per prunable position of a sparse network."""
    average_parameters: float
    explored: float
    flip_rate: float
    flops: Flops
    masks: str | None
    """SHA-256 of the file of final masks beside this one."""
    train_accuracy: float
    wall_seconds: float


class Result(Section):
    """One run. Made by `rarefy.bench.execute`, or read from its file by `Result.read`."""

    format: Literal["rarefy.bench/1"] = FORMAT
    key: Text
    run: RunSection
    method: dict[str, Any]
    train: TrainSection
    environment: Environment

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        write_whole(path, (self.model_dump_json(indent=1) + "\n").encode())

    @staticmethod
    def read(path: Path) -> "Result":
        """Raises ValueError, saying what is wrong, for a file that is not one whole result; OSError if unreadable."""
        try:
            result = Result.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(f"{path.name} is not a whole result file: {where}: {first['msg']}") from None
        if result.key != key_of(result.run, result.method, result.environment):
            raise ValueError(f"{path.name} is not a result as it was written: its key does not follow from its content")
        if result.train.nonzeros != sum(result.train.kept.values()):
            raise ValueError(
                f"{path.name} contradicts itself: {result.train.nonzeros} non-zeros are not the sum of kept"
            )
        return result


def key_of(run: RunSection, method: dict[str, Any], environment: Environment) -> str:
    """Hash of everything that decides a run's numbers."""
    decisive = {"format": FORMAT, "run": run.model_dump(), "method": method, "environment": environment.decisive()}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def load_results(folder: Path) -> tuple[list[Result], list[str]]:
    """All results in a folder, and one line for each JSON file that is none. Raises FileNotFoundError for no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of results: `rarefy bench digits --out {folder}` makes one")
    results: list[Result] = []
    problems: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            results.append(Result.read(path))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return results, problems
