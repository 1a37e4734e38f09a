"""Scores: which weights are worth keeping?

A score is a pure function `(weight, gradient, generator) -> tensor like weight`, registered under a name together with
what it needs and how the scores of a unit (a block, a channel) make one. `Score("snip")` is the value that names it.
Bigger = more worth keeping.

| name | score | gradient | source |
|---|---|---|---|
| random | uniform in [0, 1) | – | neutral baseline |
| magnitude | ∣w∣ | – | |
| taylor | ∣w·g∣, a unit's mean of magnitudes | loss | Molchanov et al. 2017, arXiv:1611.06440 |
| snip | ∣w·g∣, a unit's magnitude of the signed mean | loss | Lee et al. 2019, arXiv:1810.02340 |
| grasp | w·Hg, signed; the gradient given is Hg | curvature | Wang et al. 2020, arXiv:2002.07376 |
| synflow | ∣w·∂R/∂w∣, R the summed output for ones through ∣w∣ | flow | Tanaka et al. 2020, arXiv:2006.05467 |

A new score is one call:

>>> @register_score("doctest_distance_from_one")
... def distance_from_one(weight, gradient, generator):
...     return (weight - 1).abs()
>>> Score("doctest_distance_from_one")(torch.tensor([0.5, 3.0]))
tensor([0.5000, 2.0000])
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, overload

import torch
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from rarefy.axes.pattern import Pool
from rarefy.axes.shorthand import parse_named, suggest
from rarefy.axes.value import Value, value

Gradient = Literal["loss", "curvature", "flow"]
"""What a score's gradient is of: the loss, the loss's gradient flow (Hg), or the synaptic flow R."""

ScoreFunction = Callable[[Tensor, Any, Any], Tensor]
"""(weight, gradient or None, generator or None) -> scores of the weight's shape."""

Function = TypeVar("Function", bound=ScoreFunction)


@dataclass(frozen=True)
class Rule:
    """What a score's name stands for."""

    function: ScoreFunction
    gradient: Gradient | None = None
    pool: Pool = "mean_abs"
    random: bool = False


_rules: dict[str, Rule] = {}


def _known(name: str) -> str:
    if name not in _rules:
        raise ValueError(f"{name!r} is not a registered score; {suggest(name, _rules)}")
    return name


@value
class Score(Value):
    """A registered score, by name.

    Raises ValueError for a name that nothing is registered under.

    >>> Score("snip").gradient, Score("snip").pool
    ('loss', 'abs_mean')
    >>> Score("snip")(torch.tensor([1.0, -2.0]), gradient=torch.tensor([3.0, 0.5]))
    tensor([ 3., -1.])
    """

    name: Annotated[str, AfterValidator(_known)]

    @property
    def gradient(self) -> Gradient | None:
        """Which gradient it needs, if any."""
        return _rules[self.name].gradient

    @property
    def pool(self) -> Pool:
        """How the scores of a unit make one; also for single weights: "mean_abs" and "abs_mean" are |x| there."""
        return _rules[self.name].pool

    @property
    def random(self) -> bool:
        """Whether it draws from a generator."""
        return _rules[self.name].random

    def __str__(self) -> str:
        return self.name

    def __call__(
        self, weight: Tensor, gradient: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Raw scores, before pooling: they may be signed.

        weight: any shape and floating dtype. gradient: of the same shape, where `self.gradient` names one.
        generator: on the CPU, where `self.random`.
        Returns a tensor of the weight's shape on its device, without a graph; products of half precision weights
        are float32, in which they are exact.
        Raises ValueError if the gradient or the generator is missing or does not fit.
        """
        self._check(weight, gradient, generator)
        detached = gradient.detach() if gradient is not None and self.gradient else None
        scores = _rules[self.name].function(weight.detach(), detached, generator if self.random else None)
        if scores.shape != weight.shape:
            raise ValueError(
                f"score {self.name!r} returned shape {tuple(scores.shape)} for a weight of {tuple(weight.shape)}; "
                "it must return one score per weight"
            )
        return scores

    def _check(self, weight: Tensor, gradient: Tensor | None, generator: torch.Generator | None) -> None:
        if self.gradient and gradient is None:
            raise ValueError(f"score {self.name!r} needs the {self.gradient} gradient, got none; pass gradient=")
        if self.gradient and gradient is not None and gradient.shape != weight.shape:
            raise ValueError(
                f"score {self.name!r}: the gradient has shape {tuple(gradient.shape)}, the weight "
                f"{tuple(weight.shape)}; give one gradient per weight"
            )
        if self.random and (generator is None or generator.device.type != "cpu"):
            seen = "none" if generator is None else f"one on {generator.device}"
            raise ValueError(f"score {self.name!r} draws from a generator on the CPU, got {seen}; pass generator=")


@overload
def register_score(
    name: str, function: Function, *, gradient: Gradient | None = None, pool: Pool = "mean_abs", random: bool = False
) -> Function: ...
@overload
def register_score(
    name: str, function: None = None, *, gradient: Gradient | None = None, pool: Pool = "mean_abs", random: bool = False
) -> Callable[[Function], Function]: ...
def register_score(
    name: str,
    function: Function | None = None,
    *,
    gradient: str | None = None,
    pool: str = "mean_abs",
    random: bool = False,
) -> Function | Callable[[Function], Function]:
    """Make `function` known as `Score(name)`; without a function, a decorator.

    function: `(weight, gradient, generator) -> scores of the weight's shape`, pure; gradient and generator are None
        unless asked for.
    gradient: which gradient it is given: of the "loss", "curvature" (Hg) or "flow" (R of SynFlow).
    pool: how the scores of a unit make one: "mean_abs" mean of |x|, "abs_mean" |mean of x|, "mean" the signed mean.
    random: whether it draws from the generator.
    Returns the function as it was. Raises ValueError for a name that is taken.
    """
    _check_registration(name, gradient, pool)

    def register(function: Function) -> Function:
        _check_registration(name, gradient, pool)  # again: a kept decorator may be applied twice
        _rules[name] = Rule(function, cast(Gradient | None, gradient), cast(Pool, pool), random)
        return function

    return register if function is None else register(function)


def _check_registration(name: str, gradient: str | None, pool: str) -> None:
    if not name:
        raise ValueError("register_score: the name is empty; give the score a name")
    if name in _rules:
        raise ValueError(
            f"register_score({name!r}): the name is taken, and a result file would no longer say which score ran; "
            "choose another name"
        )
    for what, given, allowed in (("gradient", gradient, get_args(Gradient)), ("pool", pool, get_args(Pool))):
        if given is not None and given not in allowed:
            raise ValueError(f"register_score({name!r}): {what} must be one of {', '.join(allowed)}, got {given!r}")


def scores() -> tuple[str, ...]:
    """The names of all registered scores, in the order of registration."""
    return tuple(_rules)


def parse_score(x: object) -> Score:
    """A score from its name, its dict or itself. Raises ValueError for anything else.

    >>> parse_score("magnitude")
    Score(name='magnitude')
    """
    return Score(x) if isinstance(x, str) else parse_named(x, Score, {}, "a score or the name of one")


ScoreField = Annotated[Any, BeforeValidator(parse_score)]


@register_score("random", random=True)
def _random(weight: Tensor, gradient: None, generator: torch.Generator) -> Tensor:
    """Uniform float64, drawn on the CPU in row order, so that every device and memory format gets the same."""
    return torch.rand(weight.shape, dtype=torch.float64, generator=generator).to(weight.device)


@register_score("magnitude")
def _magnitude(weight: Tensor, gradient: None, generator: None) -> Tensor:
    return weight.abs()


@register_score("taylor", gradient="loss")
def _taylor(weight: Tensor, gradient: Tensor, generator: None) -> Tensor:
    return _product(weight, gradient).abs()


@register_score("snip", gradient="loss", pool="abs_mean")
def _snip(weight: Tensor, gradient: Tensor, generator: None) -> Tensor:
    """Signed: first-order effects of a unit's weights may cancel, so the pool takes the magnitude."""
    return _product(weight, gradient)


@register_score("grasp", gradient="curvature", pool="mean")
def _grasp(weight: Tensor, gradient: Tensor, generator: None) -> Tensor:
    """The sign matters: the authors remove the largest −w·Hg."""
    return _product(weight, gradient)


@register_score("synflow", gradient="flow")
def _synflow(weight: Tensor, gradient: Tensor, generator: None) -> Tensor:
    return _product(weight, gradient).abs()


def _product(weight: Tensor, gradient: Tensor) -> Tensor:
    """w·g; of half precision numbers in float32, which holds it exactly, where their own type would underflow."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight.float() * gradient.float()
    return weight * gradient
