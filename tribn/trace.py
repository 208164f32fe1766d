"""What the forward of a module computes, as a graph of torch.fx, where that is all it does.

torch.fx runs a forward once on stand-ins for its inputs and writes down what is called. Whatever
else the code did is lost, and whatever it decided is decided for good. `trace` therefore goes no
further than one module's own forward, in which other modules are single calls; notes every value of
the modules that is read, to compare before the graph is used (`Guard`); and refuses the rest.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import inspect
import io
import operator
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn

_CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, slice, range)
_CONTAINERS = (list, tuple, set, frozenset)
_PLAIN = (dict, list, tuple, torch.Size)
_MACHINERY = ("torch.fx", "torch.nn.modules.module", "torch.nn.parameter", __name__)


# What a forward may ask for by name besides torch's functions, its own and its constants
_BUILTINS = frozenset(
    (
        *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "float", "getattr"),
        *("hasattr", "int"),
        *("isinstance", "len", "list", "map", "max", "min", "range", "reversed", "round"),
        *("slice", "sorted", "str", "sum", "super", "tuple", "zip"),
    )
)
_MODULES = ("torch", "math", "operator", "functools", "typing", "einops")
# Questions whose answers a graph does not ask for again, ways past modules, and random numbers
_STATES = frozenset(
    (
        *("is_compiling", "is_exporting", "is_dynamo_compiling", "is_in_onnx_export"),
        *("is_tracing", "is_autocast_enabled", "is_grad_enabled", "is_inference_mode_enabled"),
        *("is_initialized", "__dict__", "__class__", "children", "modules", "parameters"),
        *("named_children", "named_modules", "named_parameters", "buffers", "named_buffers"),
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "rrelu"),
    )
)


class Refused(Exception):
    """Why a forward cannot be told from its trace, in words that follow its name."""


class Guard(NamedTuple):
    """What a module below, at the end of `path`, had under a name, dotted or not, when traced.

    Without a name: that there is one.
    """

    path: tuple[str, ...]
    name: str = ""
    value: Any = True

    def holds(self, module: nn.Module) -> bool:
        try:
            for step in self.path:
                module = module._modules[step]  # type: ignore[assignment]
            value: Any = module is not None
            if self.name:
                value = operator.attrgetter(self.name)(module)
        except (AttributeError, KeyError):
            return False
        if self.name == "_modules":
            value = tuple(value)
        return type(value) is type(self.value) and bool(value == self.value)


class Arguments(NamedTuple):
    """What a forward is called with: values for those `given`, and None or nothing for others."""

    names: tuple[str, ...]  # all that have a position
    given: tuple[str, ...]
    absent: frozenset[str]  # those for which None is nothing
    lists: frozenset[str] = frozenset()  # those that are lists

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
        return tuple(values[name] for name in self.given)


@dataclass(frozen=True)
class Trace:
    """A graph whose placeholders are the arguments given, in a call while the guards hold."""

    graph: fx.Graph
    arguments: Arguments
    guards: tuple[Guard, ...]


def trace(module: nn.Module) -> list[Trace]:
    """The graphs of a module's forward, in training and evaluation if it asks for the mode.

    They are for calls with the arguments that have no default, and for calls with those besides
    whose default is None, where that can be told. Call it within `watching`.

    Raises:
        Refused: the forward does what no graph tells.
    """
    forward = type(module).forward
    required, *more = _arguments(forward)
    if hasattr(forward, "__wrapped__"):
        raise Refused("has a decorator")
    if not forward.__module__.startswith("torch.nn."):
        _check(forward.__code__, forward.__globals__)
    traces = _trace_modes(module, required)
    for arguments in more:
        with contextlib.suppress(Refused):
            traces += _trace_modes(module, arguments)
    return traces


def _check(code: types.CodeType, names: dict[str, Any]) -> None:
    """That code does nothing a trace would lose: by what it is compiled to."""
    constant: Any = ...
    for step in dis.get_instructions(code):
        kind, value = step.opname, step.argval
        if kind in ("SETUP_FINALLY", "PUSH_EXC_INFO"):
            raise Refused("has a with or try statement")
        if "WITH" in kind:
            raise Refused("has a with statement")
        if kind == "IS_OP" and constant not in (None, True, False):
            raise Refused("asks what a value is")
        if kind in ("STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR", "DELETE_GLOBAL"):
            raise Refused(f"sets {value}")
        if value in _STATES and ("ATTR" in kind or "METHOD" in kind):
            raise Refused(f"asks for {value}")
        if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            _check_global(value, names)
        if not kind.startswith(("CACHE", "EXTENDED_ARG")):
            constant = value if kind == "LOAD_CONST" else ...
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            _check(inner, names)


def _check_global(name: str, names: dict[str, Any]) -> None:
    value = names.get(name)
    if name not in names:
        value = vars(builtins).get(name)
        exception = isinstance(value, type) and issubclass(value, Exception)
        if name not in _BUILTINS and not exception:
            raise Refused(f"calls {name}")
    elif isinstance(value, types.ModuleType):
        if value.__name__.split(".")[0] not in _MODULES:
            raise Refused(f"uses the module {value.__name__}")
    elif not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        raise Refused(f"reads the global {name}")


def _trace_modes(module: nn.Module, arguments: Arguments) -> list[Trace]:
    first = _trace(module, arguments)
    if all(guard.name != "training" for guard in first.guards):
        return [first]
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, training in modes:
            vars(m)["training"] = not training
        return [first, _trace(module, arguments)]
    finally:
        for m, training in modes:
            vars(m)["training"] = training


def _trace(module: nn.Module, arguments: Arguments) -> Trace:
    tracer = _Tracer(arguments)
    printed = io.StringIO()
    _running.append(tracer)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(printed),
            _without_randomness(),
        ):
            warnings.simplefilter("ignore")
            graph = tracer.trace(module)
            next(iter(reversed(graph.nodes))).type = None  # an annotation is no part of it
            compile(graph.python_code("self").src, "", "exec")
    except Refused:
        raise
    except Exception as error:  # whatever the code of the model raises when it gets a stand-in
        reason = str(error).strip().split("\n")[0]
        raise Refused(f"raises {type(error).__name__} when it is traced: {reason}") from error
    finally:
        _running.remove(tracer)
    if tracer.refusal:  # which the forward has caught
        raise Refused(tracer.refusal)
    if printed.getvalue():
        raise Refused("prints")
    guards = tuple(tracer.guards.values())
    if not all(guard.holds(module) for guard in guards):
        raise Refused("changes values of its own")
    return Trace(graph, arguments._replace(lists=frozenset(tracer.lists)), guards)


def _arguments(forward: Callable[..., Any]) -> list[Arguments]:
    """Of calls with what has no default, and with what may be None besides."""
    if not isinstance(forward, types.FunctionType):
        raise Refused(f"is a {type(forward).__name__}, not a function")
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


@contextlib.contextmanager
def _without_randomness() -> Iterator[None]:
    """Refuses code that draws random numbers, and gives the generators their states back."""
    numpy: Any = sys.modules.get("numpy")
    state = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
        drawn = not torch.equal(torch.get_rng_state(), state[0]) or random.getstate() != state[1]
        if drawn or (numpy and numpy.random.get_state()[2:] != state[2][2:]):
            raise Refused("draws random numbers")
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        if numpy:
            numpy.random.set_state(state[2])


_grad = torch.is_grad_enabled


def _modes() -> tuple[bool, ...]:
    return (
        _grad(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


class _Value(fx.Proxy):
    """A stand-in that does not say what it is, as the graph would keep the answer.

    Except that an argument is a list if somebody asks, torch.cat included. It cannot be a tensor:
    torch would look for one behind it.
    """

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            tracer: Any = self.tracer
            tracer.refuse(f"asks a value for {name}")
        return super().__getattr__(name)

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
        return _Value


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
    proxy_buffer_attributes = True

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.guards: dict[tuple[tuple[str, ...], str], Guard] = {}
        self.lists: set[str] = set()
        self.refusal = ""
        self.modes = _modes()

    def refuse(self, reason: str) -> NoReturn:
        self.refusal = reason
        raise Refused(reason)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names, given, _, _ = self.arguments
        values = [self.create_proxy("placeholder", name, (), {}) for name in given]
        n = sum(given[: i + 1] == names[: i + 1] for i in range(len(given)))  # by position

        def forward(module: nn.Module, *values: Any) -> Any:
            named = dict(zip(given[n:], values[n:], strict=True))
            return root_fn(module, *values[:n], **named)

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

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse("loops over a value")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse("takes a dictionary apart")

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value:
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

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            self.refuse("changes a mode, such as no_grad or autocast")
        return super().create_node(*args, **kwargs)

    def note(self, module: nn.Module, name: str, value: Any) -> Any:
        """What the forward reads: the value, once it has been written down."""
        if isinstance(value, types.MethodType) or type(value) is _Value:
            return value
        path = (self.submodule_paths or {}).get(module)
        if path is None:
            self.refuse(f"reads {name} of a {type(module).__name__} that is no module of its own")
        steps = tuple(path.split(".")) if path else ()
        if isinstance(value, nn.Module):  # looked up again when the graph runs
            guard = Guard((*steps, name))
        elif name == "_modules":
            guard = Guard(steps, name, tuple(value))
        elif isinstance(value, Tensor):
            self.refuse(f"reads {name}, a tensor that is no parameter or buffer")
        elif _constant(value):
            guard = Guard(steps, name, deepcopy(value))
        else:
            return _Settings(self, module, name, value)
        self.guards.setdefault((guard.path, guard.name), guard)
        return value


class _Settings:
    """An object that a module has, such as a configuration, of which values are read."""

    def _refuse(self, *args: Any) -> Any:
        tracer, _, path, _ = self.__dict__["_read"]
        tracer.refuse(f"asks what {path} is")

    __bool__ = __eq__ = __ne__ = __hash__ = __len__ = __iter__ = __contains__ = _refuse

    def __init__(self, tracer: _Tracer, module: nn.Module, name: str, value: Any) -> None:
        self.__dict__["_read"] = tracer, module, name, value

    def __getattr__(self, name: str) -> Any:
        tracer, module, path, value = self.__dict__["_read"]
        found = getattr(value, name)
        if not _constant(found):
            tracer.refuse(f"reads {path}.{name}, a {type(found).__name__}")
        return tracer.note(module, f"{path}.{name}", found)

    def __setattr__(self, name: str, value: Any) -> None:
        tracer, _, path, _ = self.__dict__["_read"]
        tracer.refuse(f"sets {path}.{name}")


def _constant(value: Any) -> bool:
    """Whether the value can be compared, and can only be replaced if it is no container."""
    if isinstance(value, _CONTAINERS):
        return all(map(_constant, value))
    if isinstance(value, dict):
        return all(_constant(v) for item in value.items() for v in item)
    return isinstance(value, (*_CONSTANTS, types.FunctionType, types.BuiltinFunctionType, type))


# What the machinery of nn.Module does not tell, where a forward is traced.

_running: list[_Tracer] = []


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Shows the tracer what is read from modules, and refuses what a graph would not show.

    Around many traces: a change of nn.Module makes Python forget what it found in its subclasses.
    """

    def getattribute(module: nn.Module, name: str) -> Any:
        if not _running or name.startswith("__") or _reader().startswith(_MACHINERY):
            return object.__getattribute__(module, name)
        modules: Any = object.__getattribute__(module, "_modules")
        value = modules.get(name)
        value = object.__getattribute__(module, name) if value is None else value
        return _running[-1].note(module, name, value)

    def refusing(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if _running and not _reader().startswith("torch.autograd"):  # as no_grad asks
                _running[-1].refuse(reason)
            return function(*args, **kwargs)

        return refuse

    apply = torch.autograd.Function.__dict__["apply"]
    changes: list[tuple[Any, str, Any]] = [
        (nn.Module, "__setattr__", refusing(nn.Module.__setattr__, "sets an attribute")),
        (
            *(torch.autograd.Function, "apply"),
            classmethod(refusing(apply.__func__, "calls an autograd function")),
        ),
        (torch, "is_grad_enabled", refusing(_grad, "asks whether gradients are enabled")),
    ]
    kept = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    nn.Module.__getattribute__ = getattribute  # type: ignore[assignment, method-assign]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
        del nn.Module.__getattribute__
