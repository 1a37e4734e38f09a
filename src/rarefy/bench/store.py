"""A folder of results: which runs are done, which are still to do, and the final masks that controls need."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from rarefy.bench.data import Data
from rarefy.bench.environment import Environment
from rarefy.bench.execute import Masks, unpack_masks
from rarefy.bench.files import write_whole
from rarefy.bench.results import Result
from rarefy.bench.runs import Run

__all__ = ["Store"]


@dataclass
class Store:
    """Results in `folder` of runs on `data` in `environment`. problems: files that should be results, and why not."""

    folder: Path
    data: Data
    environment: Environment
    problems: list[str] = field(default_factory=list)

    def path(self, run: Run) -> Path:
        """Where the result of the run belongs."""
        return self.folder / f"{run.stem(self.data, self.environment)}.json"

    def find(self, run: Run) -> Result | None:
        """The result, if its file is there, whole and of this very run; what is wrong goes into `problems`."""
        path = self.path(run)
        if not path.exists():
            return None
        try:
            result = Result.read(path)
        except (ValueError, OSError) as error:
            self.problems.append(f"{error}; it is run again")
            return None
        if result.key != run.key(self.data, self.environment):
            self.problems.append(f"{path.name} holds another run; it is run again")
            return None
        return result

    def masks(self, run: Run) -> Masks | None:
        """The final masks of a run that is done, if they are what its result says they were."""
        result, path = self.find(run), self._masks_path(run)
        if result is None or not path.exists():
            return None
        file = path.read_bytes()
        if hashlib.sha256(file).hexdigest() != result.train.masks:
            self.problems.append(f"{path.name} is not the file that its result names; the run is made again")
            return None
        return unpack_masks(file, run.task.build(0))

    def save(self, run: Run, result: Result, masks: bytes) -> None:
        """Masks first: a result whose masks are missing never exists, wherever the process is killed."""
        write_whole(self._masks_path(run), masks)
        result.write(self.path(run))

    def pending(self, runs: list[Run]) -> list[Run]:
        """The runs to make, in order; one that is done too, if a control needs its masks and they are lost."""
        todo = {run for run in runs if self.find(run) is None}
        parents = {run.parent for run in todo if run.parent is not None}
        lost = {parent for parent in parents - todo if self.masks(parent) is None}
        return [run for run in runs if run in todo | lost]

    def _masks_path(self, run: Run) -> Path:
        return self.path(run).with_suffix(".safetensors")
