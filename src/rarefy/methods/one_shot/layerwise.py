"""Block by block: every matrix of a block is solved from its inputs, which the blocks pruned before it have made.

A method of this kind overrides `solve`, from one matrix to a mask and perhaps new weights. `Pruner` is the base of
those that choose units by a budget, `Stage` of those that go on from another method's mask. `run` calls them.
"""

from typing import Annotated, Any, ClassVar, cast

from pydantic import BeforeValidator
from torch import Tensor

from rarefy.axes import AllocationField, Pattern, PatternField, Share, value
from rarefy.axes.shorthand import parse_named
from rarefy.core.method import Method
from rarefy.core.sites import Site
from rarefy.core.sparsity import Sparsity
from rarefy.methods.one_shot.matrix import Matrix, Solved
from rarefy.methods.one_shot.originals import Originals
from rarefy.methods.one_shot.prune import ByScore
from rarefy.methods.one_shot.run import Run


class Layerwise(Method):
    """Solves matrix by matrix. gram: whether `solve` needs Σ x xᵀ. rewrites: whether it returns new weights."""

    gram: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False
    needs = frozenset({"data"})
    stage = "one shot"
    scope = "blocks"
    labels = ("static", "dense-to-sparse", "simulated")

    sparsity: Any
    allocation: Any
    pattern: Any

    def solve(self, matrix: Matrix) -> Solved:
        """The mask, and new weights, of one matrix. Pure."""
        raise NotImplementedError(f"{type(self).__name__} has no solve()")

    def given(self, s: Sparsity) -> dict[Site, Tensor]:
        """Masks known before any input is seen; those of a method that scores weights alone."""
        return {}

    def begin(self, s: Sparsity) -> None:
        """Prune block by block. On an error every weight is put back; the error names the block."""
        run = Run(self, s)
        with Originals() as originals:
            try:
                run.all_blocks(originals)
            except BaseException as error:
                originals.restore()
                if run.at and isinstance(error, Exception):  # an interrupt is passed on as it is
                    raise _named(error, run.at) from error
                raise


@value
class Pruner(Layerwise):
    """Args:
    sparsity: share of zeros; may be left out with an n:m pattern.
    allocation: how many weights each layer keeps: "uniform", "owl", "erdos_renyi", sparsities by name; those that
        compare the scores of all layers ("global", "lamp") cannot be used, for these become known one after the other.
    pattern: where zeros may lie, such as "unstructured", "2:4" (2 kept), "4x1", "constant_fan_in".
    """

    sparsity: Share | None = None
    allocation: AllocationField = "uniform"
    pattern: PatternField = "unstructured"

    def __post_init__(self) -> None:
        if self.allocation.needs_scores:
            raise ValueError(
                f"{type(self).__name__}: {self.allocation} compares the scores of all layers, but each layer's become "
                'known after those before it are pruned; use "uniform", "owl" or "erdos_renyi"'
            )


def _parse_method(x: object) -> Method:
    found = parse_named(x, Method, {}, "a method that chooses a mask; Wanda(0.5), say, is one")
    if not isinstance(found, Layerwise | ByScore):
        raise ValueError(f"{found} does not choose masks at once; use Wanda, SparseGPT, ALPS, DSnoT or Magnitude")
    if isinstance(found, ByScore) and cast(Any, found.score).gradient is not None:
        raise ValueError(f"{found} needs gradients, which are not at hand block by block; use Wanda or Magnitude")
    return found


MethodField = Annotated[Any, BeforeValidator(_parse_method)]
"""The type of a field that holds the method whose mask a stage goes on from."""


class Stage(Layerwise):
    """Goes on from the mask of another method, `method`: of its sparsity, allocation and pattern."""

    method: Any

    @property
    def sparsity(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.method.sparsity

    @property
    def allocation(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.method.allocation

    @property
    def pattern(self) -> Pattern:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.method.pattern

    def given(self, s: Sparsity) -> dict[Site, Tensor]:
        if isinstance(self.method, Layerwise):
            return self.method.given(s)
        self.method.begin(s)
        return {site: s._staged[site.index][0] for site in s.sites}

    def first(self, matrix: Matrix) -> Solved:
        """What the method makes of the matrix."""
        if isinstance(self.method, Layerwise):
            return self.method.solve(matrix)
        assert matrix.mask is not None
        return Solved(matrix.mask)


def _named(error: Exception, at: str) -> Exception:
    """The same kind of error where that takes a text, else a RuntimeError; it says where, and that nothing changed."""
    kind = type(error) if type(error) in (ValueError, TypeError, MemoryError, OSError) else RuntimeError
    return kind(f"{at}: {error} Every weight was put back.")
