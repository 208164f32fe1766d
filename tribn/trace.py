"""What the forward of a module computes, as a graph of torch.fx, where that is all it does.

torch.fx runs a forward once on stand-ins for its inputs and writes down what is called. Whatever
else the code did is lost, and whatever it decided is decided for good. `trace` therefore goes no
further than one module's own forward, in which other modules are single calls; notes every value of
the modules that is read, to compare before the graph is used (`Guard`); and refuses the rest.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import operator
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn

from tribn.bytecode import CONSTANTS, Refused, check_defaults, check_value, reading, unread
from tribn.nn import watched

_CONTAINERS = (list, tuple, set, frozenset)
_PLAIN = (dict, list, tuple, torch.Size)
_MACHINERY = ("torch.fx", "torch.nn.modules.module", "torch.nn.parameter", __name__)


class Absent:
    """What a guard has for a value where there is none."""


class Present:
    """And for a parameter or buffer, whatever it is."""


class Guard(NamedTuple):
    """What a module below, at the end of `path`, had under a name, dotted or not, when traced.

    Without a name: that there is one.
    """

    path: tuple[str, ...]
    name: str = ""
    value: Any = True

    def holds(self, module: nn.Module) -> bool:
        try:
            module = _follow(module, self.path)
        except (AttributeError, KeyError):
            return False
        found: Any = module is not None
        if self.name:
            try:
                found = operator.attrgetter(self.name)(module)
            except AttributeError:
                found = Absent
        if self.name == "_modules":
            found = _names(found)
        return same(Present if isinstance(found, Tensor) else found, self.value)


class Alias(NamedTuple):
    """That the modules at two paths are one, which the graph has by the first."""

    path: tuple[str, ...]
    other: tuple[str, ...]

    def holds(self, module: nn.Module) -> bool:
        try:
            return _follow(module, self.path) is _follow(module, self.other)
        except (AttributeError, KeyError):
            return False


class Settled(NamedTuple):
    """What a module consists of, and that nothing is hooked on it."""

    path: tuple[str, ...]
    parts: tuple[tuple[str, str, Any], ...]

    @classmethod
    def of(cls, module: nn.Module, path: str) -> Settled:
        return cls(tuple(path.split(".")), _parts(module.get_submodule(path)))

    def holds(self, module: nn.Module) -> bool:
        try:
            part: nn.Module = _follow(module, self.path)
            return _parts(part) == self.parts and not any(map(watched, part.modules()))
        except (AttributeError, KeyError):
            return False


def _parts(module: nn.Module) -> tuple[tuple[str, str, Any], ...]:
    """By name: the class of a rewritten module has that of its own."""
    return tuple(
        (type(part).__module__, type(part).__qualname__, getattr(part, "inplace", False) is False)
        for part in module.modules()
    )


def _names(modules: dict[str, nn.Module | None]) -> tuple[tuple[str, bool], ...]:
    return tuple((name, module is not None) for name, module in modules.items())


def _follow(module: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        module = module._modules[step]
    return module


def same(value: Any, other: Any) -> bool:
    """Whether constants are equal, by types and in their order too."""
    if type(value) is not type(other):
        return False
    if type(value) is dict:
        return same(list(value.items()), list(other.items()))
    if type(value) in (list, tuple):
        return len(value) == len(other) and all(map(same, value, other))
    if type(value) in (set, frozenset):
        return bool({(type(v), v) for v in value} == {(type(v), v) for v in other})
    return bool(value == other) if type(value) in CONSTANTS else value is other


class Arguments(NamedTuple):
    """What a forward is called with: values for those `given`, and None or nothing for others."""

    names: tuple[str, ...]  # all that have a position
    given: tuple[str, ...]
    absent: frozenset[str]  # those for which None is nothing
    lists: frozenset[str] = frozenset()  # those that are lists
    tensors: frozenset[str] = frozenset()  # and those that are tensors

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The values of those given; None for another call."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        if len(values) != len(args) + len(kwargs):
            return None
        values = {n: v for n, v in values.items() if v is not None or n not in self.absent}
        if values.keys() != set(self.given):
            return None
        for name, value in values.items():
            if value is None or (name in self.lists and type(value) is not list):
                return None
            if name in self.tensors and not isinstance(value, Tensor):
                return None
        return tuple(values[name] for name in self.given)


@dataclass(frozen=True)
class Trace:
    """A graph whose placeholders are the arguments given, in a call while the guards hold."""

    graph: fx.Graph
    arguments: Arguments
    guards: tuple[Guard | Alias | Settled, ...]


def trace(module: nn.Module) -> list[Trace]:
    """The graphs of a module's forward, in training and evaluation if it asks for the mode.

    They are for calls with the arguments that have no default, and for calls with those besides
    whose default is None, where that can be told. Call it within `watching`.

    Raises:
        Refused: the forward does what no graph tells.
    """
    required, *more = _arguments(type(module).forward)
    traces = _trace_modes(module, required)
    for arguments in more:
        with contextlib.suppress(Refused):
            traces += _trace_modes(module, arguments)
    return traces


def _trace_modes(module: nn.Module, arguments: Arguments) -> list[Trace]:
    first = _trace(module, arguments)
    if not any(isinstance(guard, Guard) and guard.name == "training" for guard in first.guards):
        return [first]
    modes = [(m, m.training) for m in module.modules() if "training" in vars(m)]
    try:
        for m, training in modes:
            vars(m)["training"] = not training
        return [first, _trace(module, arguments)]
    finally:
        for m, training in modes:
            vars(m)["training"] = training


def _trace(module: nn.Module, arguments: Arguments) -> Trace:
    tracer = _Tracer(arguments)
    _thread.tracer = tracer
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
            warnings.simplefilter("ignore")
            graph = tracer.trace(module)
            next(iter(reversed(graph.nodes))).type = None  # an annotation is no part of it
            code = graph.python_code("self")
            compile(code.src, "", "exec")
    except Refused:
        raise
    except Exception as error:  # whatever the code of the model raises when it gets a stand-in
        reason = str(error).strip().split("\n")[0]
        raise Refused(f"raises {type(error).__name__} when it is traced: {reason}") from error
    finally:
        _thread.tracer = None
    if tracer.refusal:  # which the forward has caught
        raise Refused(tracer.refusal)
    for name in arguments.given:
        if name in code.globals or name == "tribn_then":
            raise Refused(f"has an argument that is named {name}")
    guards: list[Guard | Alias | Settled] = [*tracer.guards.values(), *_aliases(module, graph)]
    kept = all(same(copy, tracer.guards[at].value) for at, copy in tracer.copies.items())
    if not kept or not all(guard.holds(module) for guard in guards):
        raise Refused("changes values of its own")
    arguments = arguments._replace(
        lists=frozenset(tracer.lists), tensors=frozenset(tracer.tensors - tracer.lists)
    )
    return Trace(graph, arguments, tuple(guards))


def _aliases(module: nn.Module, graph: fx.Graph) -> Iterator[Alias]:
    """Of the modules that a graph calls, or has parts of, those with another path."""
    used = [tuple(str(n.target).split(".")) for n in graph.nodes if n.op == "call_module"]
    first: dict[nn.Module, tuple[str, ...]] = {}
    queue: list[tuple[nn.Module, tuple[str, ...]]] = [(module, ())]
    while queue:
        m, path = queue.pop()
        if first.setdefault(m, path) is path:
            below = [
                (child, (*path, name)) for name, child in m._modules.items() if child is not None
            ]
            queue += reversed(below)  # in the order of named_modules
        elif any(path[: len(first[m])] == first[m] for path in used):
            yield Alias(first[m], path)


def _arguments(forward: Callable[..., Any]) -> list[Arguments]:
    """Of calls with what has no default, and with what may be None besides."""
    if not isinstance(forward, types.FunctionType):
        raise Refused(f"is a {type(forward).__name__}, not a function")
    if not forward.__module__.startswith("torch.nn."):
        check_defaults(forward)
    names, required, optional = [], [], []
    for p in list(inspect.signature(forward).parameters.values())[1:]:
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(p.name)
            if p.default is p.empty:
                required.append(p.name)
            elif p.default is None and p.kind == p.POSITIONAL_OR_KEYWORD:
                optional.append(p.name)
        elif p.kind == p.KEYWORD_ONLY and p.default is p.empty:
            raise Refused(f"takes {p.name} by name alone")
        elif p.kind == p.VAR_POSITIONAL and not required:
            raise Refused(f"takes *{p.name}")
    calls = [required, required + optional] if optional else [required]
    return [Arguments(tuple(names), tuple(c), frozenset(optional) - set(c)) for c in calls]


class _Value(fx.Proxy):  # and, below, an attribute of one
    """A stand-in that does not say what it is, as the graph would keep the answer.

    Except that an argument is a list if somebody asks, torch.cat included. It cannot be a tensor:
    torch would look for one behind it.
    """

    def __getattr__(self, name: str) -> Any:
        tracer: Any = self.tracer
        if not hasattr(Tensor, name):
            tracer.refuse(f"asks a value for {name}")
        if self.node.op == "placeholder":
            tracer.tensors.add(self.node.target)
        return _Attribute(self, name)

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        with unread():
            steps = list(dis.get_instructions(frame.f_code))
        last = next(step for step in steps if step.offset == frame.f_lasti)
        tracer: Any = self.tracer
        if last.opname != "UNPACK_SEQUENCE":
            tracer.refuse("loops over a value")
        values = tracer.create_proxy("call_function", unpack, (self, last.argval), {})
        return iter([values[n] for n in range(last.argval)])

    def __str__(self) -> str:
        if not _reader().startswith(_MACHINERY):
            tracer: Any = self.tracer
            tracer.refuse("writes a value as text")
        return super().__repr__()

    __repr__ = __str__

    def __format__(self, _: str) -> str:
        tracer: Any = self.tracer
        return tracer.refuse("writes a value as text")  # type: ignore[no-any-return]

    def __hash__(self) -> int:
        if not _reader().startswith(_MACHINERY):
            tracer: Any = self.tracer
            tracer.refuse("looks up by a value")
        return id(self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not _reader().startswith(_MACHINERY):
            tracer: Any = self.tracer
            if self.node.op != "placeholder":
                tracer.refuse("asks for the type of a value")
            tracer.lists.add(self.node.target)
            return list
        return type(self)


class _Attribute(_Value, fx.proxy.Attribute):
    """One that a method call does not ask for."""


def unpack(values: Any, count: int) -> tuple[Any, ...]:
    """As many values as they are taken for."""
    unpacked = tuple(values)
    if len(unpacked) != count:
        raise ValueError(f"{len(unpacked)} values are unpacked: there must be {count}")
    return unpacked


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator as one call; torch.fx itself takes `a += b` for `a = a + b`."""

    def call(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


for _name in (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
):
    setattr(_Value, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


def _reader() -> str:
    """The module whose code asks."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


class _Tracer(fx.Tracer):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.guards: dict[tuple[tuple[str, ...], str], Guard] = {}
        self.copies: dict[tuple[tuple[str, ...], str], Any] = {}  # of containers, as handed out
        self.types: list[Guard] = []  # of the modules that are read
        self.lists: set[str] = set()
        self.tensors: set[str] = set()  # of the arguments, what is a tensor
        self.attributes: dict[str, Any] = {}  # parameters and buffers, by path
        self.called: set[nn.Module] = set()  # and what is in them
        self.refusal = ""

    def refuse(self, reason: str) -> NoReturn:
        self.refusal = reason
        raise Refused(reason)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names, given, *_ = self.arguments
        values = [self.create_proxy("placeholder", name, (), {}) for name in given]
        n = sum(given[: i + 1] == names[: i + 1] for i in range(len(given)))  # by position

        def forward(module: nn.Module, *values: Any) -> Any:
            named = dict(zip(given[n:], values[n:], strict=True))
            with reading(self.refuse) as asked:
                y = root_fn(module, *values[:n], **named)
            if "isinstance" in asked:
                self.guards |= {(guard.path, guard.name): guard for guard in self.types}
            return y

        return forward, [self.root, *values]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def path_of_module(self, mod: nn.Module) -> str:
        path = (self.submodule_paths or {}).get(mod)
        if not path:
            self.refuse(f"calls a {type(mod).__name__} that is no module of its own")
        return path

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("depends on the value or the shape of a tensor")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse("takes a dictionary apart")

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), _Value):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            self.refuse("makes a tensor of its own")
        if (
            isinstance(a, (dict, list, tuple))
            and type(a) not in _PLAIN
            and not hasattr(a, "_fields")
        ):
            self.refuse(f"makes a {type(a).__name__}")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if any(map(_changeable, (*args, *kwargs.values()))):
            self.refuse("gives a list or dictionary to a module, which may change it")
        self.called |= set(m.modules())
        return super().call_module(m, forward, args, kwargs)

    def note(self, module: nn.Module, name: str, value: Any) -> Any:
        """What the forward reads: the value, once it has been written down."""
        if issubclass(type(value), _Value):
            return value
        path = (self.submodule_paths or {}).get(module)
        if path is None:
            self.refuse(f"reads {name} of a {type(module).__name__} that is no module of its own")
        steps = tuple(path.split(".")) if path else ()
        if isinstance(value, nn.Module):  # looked up again when the graph runs
            guard = Guard((*steps, name))
            self.note_type(guard.path, value)
        elif name == "_modules":
            guard = Guard(steps, name, _names(value))
            for child, of in value.items():
                self.note_type((*steps, child), of)
        elif isinstance(value, types.MethodType):
            if value.__self__ is not module or type(value.__func__) is not types.FunctionType:
                self.refuse(f"reads {name}, a method of another object")
            if name == "forward":
                self.refuse("calls the forward of a module")
            self.check(check_defaults, value.__func__)
            guard = Guard(steps, f"{name}.__func__", value.__func__)
        elif module in self.called:
            self.refuse(f"reads {name} of a module that it has called, which may have set it")
        elif isinstance(value, Tensor):
            held = module._parameters.get(name, module._buffers.get(name))
            if value is not held:
                self.refuse(f"reads {name}, a tensor that is no parameter or buffer")
            guard = Guard(steps, name, Present)
            path = ".".join((*steps, name))
            if path not in self.attributes:
                self.attributes[path] = self.create_proxy("get_attr", path, (), {})
            value = self.attributes[path]
        elif _constant(value):
            if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                self.check(check_value, name, value)
            guard = Guard(steps, name, deepcopy(value))
        else:
            guard = Guard(steps, f"{name}.__class__", type(value))
            self.guards.setdefault((guard.path, guard.name), guard)
            return _Settings(self, module, name, value)
        at = guard.path, guard.name
        self.guards.setdefault(at, guard)
        if type(value) in (*_CONTAINERS, dict) and name != "_modules":
            return self.copies.setdefault(at, deepcopy(value))
        return value

    def check_computed(self, module: nn.Module, name: str) -> None:
        """That an attribute is found, or computed by code that is read, and not kept."""
        with unread():
            classes = [vars(cls) for cls in type(module).__mro__ if name in vars(cls)]
            if not classes or name in vars(module):
                return
            kind = type(classes[0][name])
            found = kind in (types.FunctionType, property, staticmethod)
            if not found and hasattr(kind, "__get__"):
                self.refuse(f"reads {name}, a {kind.__name__}")

    def check(self, check: Callable[..., Any], *args: Any) -> None:
        try:
            check(*args)
        except Refused as refusal:
            self.refuse(str(refusal))

    def note_type(self, path: tuple[str, ...], module: nn.Module | None) -> None:
        if module is not None:  # by its name: that of a rewritten module is the same
            for name in ("__module__", "__qualname__"):
                self.types.append(Guard(path, f"__class__.{name}", getattr(type(module), name)))


class _Settings:
    """An object that a module has, such as a configuration, of which values are read."""

    def _refuse(self, *args: Any) -> Any:
        tracer, _, path, _ = self.__dict__["_read"]
        tracer.refuse(f"asks what {path} is")

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not _reader().startswith(_MACHINERY):
            self._refuse()
        return _Settings

    __bool__ = __len__ = __iter__ = __contains__ = _refuse
    __eq__ = __ne__ = __hash__ = __str__ = __repr__ = __format__ = _refuse

    def __init__(self, tracer: _Tracer, module: nn.Module, name: str, value: Any) -> None:
        self.__dict__["_read"] = tracer, module, name, value

    def __getattr__(self, name: str) -> Any:
        tracer, module, path, value = self.__dict__["_read"]
        with unread():  # how it comes by its values is its own affair: they are compared
            found = getattr(value, name, Absent)
            if not _constant(found):
                tracer.refuse(f"reads {path}.{name}, a {type(found).__name__}")
            found = tracer.note(module, f"{path}.{name}", found)
            return getattr(value, name) if found is Absent else found

    def __setattr__(self, name: str, value: Any) -> None:
        tracer, _, path, _ = self.__dict__["_read"]
        tracer.refuse(f"sets {path}.{name}")


def _constant(value: Any) -> bool:
    """Whether the value can be compared, and can only be replaced if it is no container."""
    if type(value) in _CONTAINERS:
        return all(map(_constant, value))
    if type(value) is dict:
        return all(_constant(v) for item in value.items() for v in item)
    functions = (types.FunctionType, types.BuiltinFunctionType, type)
    return type(value) in CONSTANTS or isinstance(value, functions)


def _changeable(value: Any) -> bool:
    """Whether a value is, or holds, one that whoever has it can change."""
    if isinstance(value, tuple):
        return any(map(_changeable, value))
    return isinstance(value, (list, dict, set))


# What the machinery of nn.Module does not tell, where a forward is traced.

_thread = threading.local()  # with the tracer that runs in it
_watching = threading.Lock()


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Shows the tracer what is read from modules.

    Around many traces: a change of nn.Module makes Python forget what it found in its subclasses.
    """

    def getattribute(module: nn.Module, name: str) -> Any:
        tracer: _Tracer | None = getattr(_thread, "tracer", None)
        if tracer is None or name.startswith("__") or _reader().startswith(_MACHINERY):
            return object.__getattribute__(module, name)
        tracer.check_computed(module, name)
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            kinds = ("_parameters", "_buffers", "_modules")
            held: Any = [object.__getattribute__(module, kind) for kind in kinds]
            value = next((of[name] for of in held if name in of), Absent)
        with unread():
            value = tracer.note(module, name, value)
        return object.__getattribute__(module, name) if value is Absent else value

    with _watching:
        nn.Module.__getattribute__ = getattribute  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            del nn.Module.__getattribute__
