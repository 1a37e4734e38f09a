"""Tasks: which images, which network, which recipe. A task is a value, so a result file can name exactly what ran.

>>> task = Digits(steps=300)
>>> task.to_dict()["steps"], task.network
(300, 'MLP 64-300-100-10')
"""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from rarefy.axes.value import Share, Value, value
from rarefy.bench.data import Data, load_digits, load_fashion_mnist
from rarefy.bench.models import SmallResNet, initialise, mlp, quiet
from rarefy.bench.seeds import generator

__all__ = ["TASKS", "Digits", "FashionMNIST", "FashionMNISTResNet", "Task", "parse_task"]

Count = Annotated[int, Field(ge=1)]


@value
class Task(Value):
    """SGD with momentum and weight decay, rate on a half cosine from `rate` to 0, accuracy after the last step.

    every: optimizer steps between two changes of a dynamic mask.
    prune_at: share of the steps after which a one-shot method prunes the network; the other steps fine-tune it.
    judge: "validation" holds a fifth of the training images out, and the test images are not looked at.
    """

    steps: Count
    batch: Count
    every: Count
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    prune_at: Share = 0.5
    judge: Literal["test", "validation"] = "test"

    name: ClassVar[str] = ""
    network: ClassVar[str] = ""
    inputs: ClassVar[int] = 784
    width: ClassVar[int] = 300
    """Units of the first hidden layer, channels of the stem."""

    def build(self, seed: int, width: int | None = None) -> nn.Module:
        """The network with the first weights of `seed`; another `width` makes it narrower or wider."""
        model = quiet(lambda: self._network(width or self.width))
        initialise(model, generator("weights", seed))
        return model

    def load(self, folder: Path | None = None) -> Data:
        """The images. Raises FileNotFoundError or ValueError, see `rarefy.bench.data`."""
        data = self._data(folder)
        return data if self.judge == "test" else data.held_out()

    def _network(self, width: int) -> nn.Module:
        return mlp((self.inputs, width, max(1, round(width / 3)), 10))

    def _data(self, folder: Path | None) -> Data:
        raise NotImplementedError


@value
class Digits(Task):
    """1797 handwritten 8×8 digits that scikit-learn carries, pixels / 16; 1200 to train, 597 to test."""

    steps: Count = 1500
    batch: Count = 64
    every: Count = 50

    name: ClassVar[str] = "digits"
    network: ClassVar[str] = "MLP 64-300-100-10"
    inputs: ClassVar[int] = 64

    def _data(self, folder: Path | None) -> Data:
        return load_digits()


@value
class FashionMNIST(Task):
    """60 000 pictures of clothes to train, 10 000 to test, 28×28, standardised; no augmentation."""

    steps: Count = 3000
    batch: Count = 128
    every: Count = 50

    name: ClassVar[str] = "fashion-mnist"
    network: ClassVar[str] = "LeNet-300-100"

    def _data(self, folder: Path | None) -> Data:
        return load_fashion_mnist(folder)


@value
class FashionMNISTResNet(FashionMNIST):
    """The same pictures, a residual network of 8 layers."""

    steps: Count = 1500

    name: ClassVar[str] = "fashion-mnist-resnet"
    network: ClassVar[str] = "ResNet-8 of width 16"
    width: ClassVar[int] = 16

    def _network(self, width: int) -> nn.Module:
        return SmallResNet(width)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Digits, FashionMNIST, FashionMNISTResNet)}


def parse_task(name: str, *, steps: int | None = None, judge: str = "test") -> Task:
    """The task of that name, with other `steps` if given. Raises ValueError for an unknown name.

    >>> str(parse_task("digits", steps=300))
    'Digits(steps=300)'
    """
    if name not in TASKS:
        raise ValueError(f"no task is named {name!r}; there are {', '.join(TASKS)}")
    task: Task = TASKS[name]()  # pyright: ignore[reportCallIssue]  the tasks have defaults
    changes = {"steps": steps} if steps is not None else {}
    return dataclasses.replace(task, judge=judge, **changes)
