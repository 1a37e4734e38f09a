"""Plans: modules that run as one native call, because all that they do is packed layers and what stands between them.

At batch 1 a call costs as much as a product. `install` looks for chains in nn.Sequential and for small modules that
torch.fx can read as packed layers, activations, sums and products of their inputs (a gated MLP, say), and gives those
modules a `forward` of their own: an attribute of the module, which copies and pickles with it. It runs the ordinary
forward where anything is unusual: training, hooks on what is inside, gradients, torch.compile, torch.export.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from rarefy.runtime.direct import DirectLinear
from rarefy.runtime.kernels import Activation, Operation
from rarefy.runtime.layers import PackedLinear
from rarefy.runtime.packed import Packed
from rarefy.runtime.program import Line, Program, fused

_is_compiling = torch.compiler.is_compiling
_LAYERS = (PackedLinear, DirectLinear)
_LARGEST = 16  # modules in one that torch.fx is asked to read
_PASSED = (nn.Identity, nn.Dropout)


class Chain:
    """nn.Sequential's forward: runs of its children as one call each, the others one by one."""

    def __init__(self, module: nn.Sequential, parts: list[tuple[Program | None, list[nn.Module]]]) -> None:
        self.module, self.parts = module, parts

    def forward(self, input: Any) -> Any:
        """As nn.Sequential."""
        if _is_compiling() or not isinstance(input, Tensor):
            return cast(Any, nn.Sequential).forward(self.module, input)
        for program, modules in self.parts:
            result = None if program is None or not isinstance(input, Tensor) else program.run(input)
            if result is None:
                for module in modules:
                    input = module(input)
            else:
                input = result
        return input


class Whole:
    """The forward of a module that is one program."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        self.module, self.program = module, program

    def forward(self, *given: Any, **named: Any) -> Any:
        """As the module's class does it."""
        if not _is_compiling() and not named and not self.module.training and len(given) == self.program.inputs:
            result = self.program.run(*given)
            if result is not None:
                return result
        return type(self.module).forward(self.module, *given, **named)


def install(model: nn.Module) -> tuple[str, ...]:
    """Give a forward to all modules in which several steps can be one call; their names."""
    return tuple(_visit("", model, set()))


def installed(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The modules that have a forward from here, with it."""
    given = [(m, m.__dict__.get("forward")) for m in model.modules()]
    return [(m, forward) for m, forward in given if isinstance(getattr(forward, "__self__", None), Chain | Whole)]


def remove(model: nn.Module) -> None:
    """Take back what `install` gave."""
    for module, _ in installed(model):
        del module.__dict__["forward"]


def _visit(name: str, module: nn.Module, done: set[nn.Module]) -> Iterator[str]:
    if module in done or isinstance(module, (*_LAYERS, Packed)):
        return
    done.add(module)
    if not any(isinstance(m, _LAYERS) for m in module.modules()):
        return
    if "forward" not in module.__dict__:
        made = _chain(module) if type(module) is nn.Sequential else _read(module)
        if made is not None:
            cast(Any, module).forward = made.forward  # bound: it copies and pickles with what it is bound to
            yield name or "(itself)"
        if isinstance(made, Whole):
            return
    for child_name, child in module.named_children():
        yield from _visit(f"{name}.{child_name}".lstrip("."), child, done)


# --- chains ----------------------------------------------------------------------------------------------------------


def _chain(module: nn.Sequential) -> Chain | None:
    parts: list[tuple[Program | None, list[nn.Module]]] = []
    run: list[nn.Module] = []
    for child in [*module, None]:
        if child is not None and (isinstance(child, (*_LAYERS, *_PASSED)) or activation_of(child) is not None):
            run.append(child)
            continue
        if run:
            parts.append((_program(run), run))
            run = []
        if child is not None:
            parts.append((None, [child]))
    return Chain(module, parts) if any(program is not None for program, _ in parts) else None


def _program(modules: list[nn.Module]) -> Program | None:
    """One call for a run of children, if it saves any."""
    lines: list[Line] = []
    for child in modules:
        at = len(lines)
        if isinstance(child, _LAYERS):
            lines.append(Line(Operation.LINEAR, at, at + 1, layer=child))
        elif not isinstance(child, _PASSED):
            lines.append(Line(Operation.APPLY, at, at + 1, activation=cast(Activation, activation_of(child))))
    return _worthwhile(1, lines, modules)


def _worthwhile(inputs: int, lines: list[Line], modules: list[nn.Module]) -> Program | None:
    if len(lines) < 2 or not any(line.layer is not None for line in lines):
        return None
    return Program(inputs, fused(inputs, lines), modules)


def activation_of(module: nn.Module) -> Activation | None:
    """What an activation module applies; None for other modules. One that writes in place is no different here."""
    if type(module) is nn.ReLU:
        return Activation.RELU
    if type(module) is nn.GELU:
        return Activation.GELU_TANH if module.approximate == "tanh" else Activation.GELU
    return Activation.SILU if type(module) is nn.SiLU else None


# --- modules that torch.fx can read ----------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Packed layers and torch's own modules are leaves; others are read through."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_LAYERS, Packed)) or super().is_leaf_module(m, module_qualified_name)


def _read(module: nn.Module) -> Whole | None:
    modules = list(module.modules())
    if len(modules) > _LARGEST or type(module).forward is nn.Module.forward:
        return None
    graph = _traced(module, modules)
    if graph is None:
        return None
    reader = _Reader(module)
    program = reader.program(graph)
    return None if program is None else Whole(module, program)


def _traced(module: nn.Module, modules: list[nn.Module]) -> fx.Graph | None:
    """The graph of a forward in evaluation mode. A forward that keeps something on a module is not traced: put back."""
    before = [dict(m.__dict__) for m in modules]
    inner = [{k: dict(cast(Any, v)) for k, v in m.__dict__.items() if type(v) is dict} for m in modules]
    try:
        for m in modules:
            m.training = False
        graph = _Tracer().trace(module)
        changed = any(
            m.__dict__.keys() != b.keys() or any(m.__dict__[k] is not b[k] for k in b if k != "training")
            for m, b in zip(modules, before, strict=True)
        )
    except Exception:  # noqa: BLE001  whatever a forward does that cannot be traced: it runs as it is
        return None
    finally:
        for m, b, dicts in zip(modules, before, inner, strict=True):
            m.__dict__.clear()
            m.__dict__.update(b)
            for key, content in dicts.items():
                m.__dict__[key].clear()
                m.__dict__[key].update(content)
    return None if changed else graph


class _Unreadable(Exception):
    """Something that a program cannot do."""


_operator: Any = operator
_torch: Any = torch
_IN_PLACE: tuple[Any, ...] = (_operator.iadd, _operator.imul, "add_", "mul_")
_ADD: tuple[Any, ...] = (_operator.add, _operator.iadd, _torch.add, "add", "add_")
_MUL: tuple[Any, ...] = (_operator.mul, _operator.imul, _torch.mul, "mul", "mul_")
_ACTIVATIONS: dict[Any, Activation] = {
    functional.relu: Activation.RELU, torch.relu: Activation.RELU, "relu": Activation.RELU,
    functional.silu: Activation.SILU, functional.gelu: Activation.GELU,
}  # fmt: skip


class _Reader:
    """From a graph to a program."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.numbers: dict[fx.Node, int] = {}
        self.lines: list[Line] = []
        self.used: list[nn.Module] = []
        self.inputs = 0

    def program(self, graph: fx.Graph) -> Program | None:
        """None where some node is nothing that a program can do, or nothing is saved."""
        result: fx.Node | None = None
        try:
            for node in graph.nodes:
                if node.op == "output":
                    result = node.args[0]
                else:
                    self.numbers[node] = self._value(node)
        except _Unreadable:
            return None
        if not isinstance(result, fx.Node) or not self.lines or self.numbers[result] != self.lines[-1].y:
            return None
        return _worthwhile(self.inputs, self.lines, self.used)

    def _value(self, node: fx.Node) -> int:
        if node.op == "placeholder":
            if node.args or self.lines or str(node.target).startswith("*"):  # a default, or *args
                raise _Unreadable
            self.inputs += 1
            return self.inputs - 1
        if node.op == "call_module":
            return self._module(self.module.get_submodule(str(node.target)), node)
        if node.op in ("call_function", "call_method"):
            return self._function(node)
        raise _Unreadable

    def _module(self, module: nn.Module, node: fx.Node) -> int:
        if len(node.args) != 1 or node.kwargs:
            raise _Unreadable
        x = self._number(node.args[0])
        activation = activation_of(module)
        if isinstance(module, _LAYERS):
            self.used.append(module)
            return self._add(Operation.LINEAR, x, layer=module)
        if isinstance(module, _PASSED):
            self.used.append(module)
            return x
        if activation is None or (getattr(module, "inplace", False) and x < self.inputs):
            raise _Unreadable
        self.used.append(module)
        return self._add(Operation.APPLY, x, activation=activation)

    def _function(self, node: fx.Node) -> int:
        target: Any = node.target
        if target is functional.dropout:
            return self._number(node.args[0])  # in evaluation mode
        if target in _ACTIVATIONS and len(node.args) == 1:
            return self._activation(_ACTIVATIONS[target], node)
        if len(node.args) != 2 or node.kwargs:
            raise _Unreadable
        in_place = target in _IN_PLACE
        x, other = (self._number(a) for a in node.args)
        if in_place and (x < self.inputs or len(cast(fx.Node, node.args[0]).users) > 1):
            raise _Unreadable
        if target in _ADD:
            return self._add(Operation.ADD, x, other)
        if target in _MUL:
            return self._add(Operation.MUL, x, other)
        raise _Unreadable

    def _activation(self, activation: Activation, node: fx.Node) -> int:
        options = dict(node.kwargs)
        if options.pop("approximate", "none") == "tanh":
            activation = Activation.GELU_TANH
        x = self._number(node.args[0])
        if options.pop("inplace", False) and x < self.inputs:
            raise _Unreadable
        if options:
            raise _Unreadable
        return self._add(Operation.APPLY, x, activation=activation)

    def _number(self, argument: Any) -> int:
        if not isinstance(argument, fx.Node):
            raise _Unreadable
        return self.numbers[argument]

    def _add(self, operation: Operation, x: int, other: int = -1, **rest: Any) -> int:
        # Inputs come first, and all of them are known before the first line: a later placeholder is refused.
        y = self.inputs + len(self.lines)
        self.lines.append(Line(operation, x, y, other, **rest))
        return y
