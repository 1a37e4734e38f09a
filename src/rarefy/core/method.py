"""The contract of a method: frozen hyper-parameters and five hooks; every tensor that changes lives in the handle."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from rarefy.axes import Value, from_dict

if TYPE_CHECKING:
    import rarefy.core.sparsity

__all__ = ["Driver", "Journal", "Method", "Progress", "all_methods", "method_from_dict", "register"]

Progress = Callable[[int, int, str], object]
"""Is told how many of how many blocks are done, and the name of the next."""


@runtime_checkable
class Journal(Protocol):
    """Where a block-wise method notes what is finished, so that an interrupted run continues there."""

    def done(self) -> list[str]:
        """Names of the finished blocks."""
        ...

    def load(self, block: str, *, masks: bool = True) -> dict[str, Tensor]:
        """What `keep` was given, masks where they are asked for."""
        ...

    def keep(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        """Note a block as finished."""
        ...

    @property
    def lean(self) -> bool:
        """Whether finished weights and masks leave memory."""
        ...

    def spill(self, tensor: Tensor) -> Tensor:
        """A tensor's bits mapped on its disk; the tensor itself where it is not lean."""
        ...


T = TypeVar("T", bound="type[Method] | type[Driver]")


class Method(Value):
    """What to make sparse and how; a value, so that a result file can name exactly what ran.

    `needs` names what the method cannot do without: "data" (batches), "loss" (with `loss(model, batch)`), "optimizer",
    "steps" (the length of the run), "master" (a dense weight behind the sparse one that the forward pass uses).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    stage: ClassVar[str] = "one shot"
    paper: ClassVar[str] = ""
    extra_cost: ClassVar[str] = "none"
    labels: ClassVar[tuple[str, ...]] = ("static", "sparse-to-sparse", "simulated")
    executions: ClassVar[frozenset[str]] = frozenset({"simulated"})
    """How it can run: "sparse" too where it reads masks, weights and dense gradients by `choose.kept_weights`,
    `choose.exchanged` and `s.dense_gradient_rows` alone once `begin` is over, and leaves the counts as they are."""
    scope: ClassVar[str] = "all"
    """Which sites are meant where nobody names any: "all", or those in repeated "blocks" of models that have some."""
    dense_backward: ClassVar[bool] = False
    """FLOPs convention: whether the gradient of the input is counted as dense (straight-through methods)."""

    def begin(self, s: "rarefy.core.sparsity.Sparsity") -> None:
        """Choose the first masks: `s.keep(site, mask)` for every site."""
        raise NotImplementedError(f"{type(self).__name__} has no begin()")

    def wants_dense_gradient(self, step: int, steps: int | None) -> bool:
        """Whether the gradient at masked positions is needed in the step that follows `step` completed ones. Pure."""
        return False

    def on_gradients(self, s: "rarefy.core.sparsity.Sparsity") -> None:
        """Gradients of `s.ready` are final: accumulated, unscaled, reduced, clipped. `s.step` steps are complete."""

    def on_weights(self, s: "rarefy.core.sparsity.Sparsity") -> None:
        """Weights were just updated; `s.step` counts this step too."""

    def end(self, s: "rarefy.core.sparsity.Sparsity") -> None:
        """Called once by `Sparsity.end()`; the handle itself leaves exact zeros and a plain model behind."""


class Driver(Value):
    """A method that runs training itself, several times: `run(model, train, evaluate=None) -> Sparsity`."""

    stage: ClassVar[str] = "iterative"
    paper: ClassVar[str] = ""
    extra_cost: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"train"})
    labels: ClassVar[tuple[str, ...]] = ("static", "dense-to-sparse", "simulated")


_METHODS: dict[str, type[Method] | type[Driver]] = {}


def register(method: T) -> T:
    """List a method class under its name; the contract tests and `rarefy methods` walk this list."""
    if _METHODS.setdefault(method.__name__, method) is not method:
        raise ValueError(f"a method named {method.__name__!r} is registered already: choose another name")
    return method


def all_methods() -> Mapping[str, type[Method] | type[Driver]]:
    """Name → class of every registered method, in the order of registration."""
    return dict(_METHODS)


def method_from_dict(data: Mapping[str, Any]) -> Method | Driver:
    """The method that `to_dict` wrote. Raises ValueError when the dictionary names something else."""
    found = from_dict(data)
    if not isinstance(found, Method | Driver):
        raise ValueError(f"expected a method, got {found}: one of {', '.join(_METHODS)} would work")
    return found
