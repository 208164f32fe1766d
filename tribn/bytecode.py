"""What code does that a trace of it would lose, told before it runs, by what it is compiled to."""

from __future__ import annotations

import builtins
import contextlib
import dis
import gc
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

CONSTANTS = (
    *(type(None), bool, int, float, str, bytes, slice, range),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)

# What code may ask for by name, besides functions and classes
_BUILTINS = frozenset(
    (
        *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "float", "getattr"),
        *("hasattr", "int", "isinstance", "len", "list", "map", "max", "min", "range"),
        *("reversed", "round", "slice", "sorted", "str", "sum", "super", "tuple", "zip"),
    )
)

# Packages whose code is not read, but for these modules of torch
_TRUSTED = frozenset(
    (
        *("torch", "tribn", "einops", "builtins", "math", "operator", "_operator", "functools"),
        *("_functools", "typing", "collections", "enum", "abc"),
    )
)
_STANDARD = sys.stdlib_module_names
_REFUSED = {
    "torch.utils._contextlib": "changes a mode, such as no_grad",
    "torch.autograd.grad_mode": "changes a mode, such as no_grad",
    "torch.amp.autocast_mode": "changes a mode, such as autocast",
    "torch.autograd.graph": "changes what is saved for backward",
    "torch.utils.checkpoint": "is checkpointed",
    "torch.autograd.function": "calls an autograd function",
    "torch.autograd.profiler": "is profiled",
    "torch.profiler.profiler": "is profiled",
    "torch.random": "draws random numbers",
    "torch._compile": "is compiled, or kept from it, in part",
    "torch._dynamo.eval_frame": "is compiled, or kept from it, in part",
}

# The class of modules, what a forward may call of it, and who else may call all of it
_CLASS = "torch.nn.modules.module"
_ASKED = ("__getattr__", "__init__")
_ASKING = ("torch.fx", "tribn.", _CLASS)

# Questions whose answers a graph does not ask for again, ways past modules, and random numbers
_STATES = frozenset(
    (
        *("__dict__", "__class__", "children", "modules", "parameters", "buffers"),
        *("named_children", "named_modules", "named_parameters", "named_buffers"),
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
        *("normal", "bernoulli", "multinomial", "poisson", "rrelu", "uniform_", "normal_"),
        *("bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
    )
)
_STATE = ("is_", "are_", "has_", "get_", "current_", "default_", "initial_", "seed", "_")
_ANSWERED = ("is_scripting", "_assert")  # which begin so, and are the same every time


class Refused(Exception):
    """Why a forward cannot be told from its trace, in words that follow its name."""


@contextlib.contextmanager
def reading(refuse: Callable[[str], None]) -> Iterator[set[str]]:
    """Reads code before it runs in this thread, and gives the names of builtins that it asks for.

    Calls `refuse`, which raises, with what a trace would lose.
    """
    asked: set[str] = set()
    trusted: set[types.CodeType] = set()
    read: dict[types.CodeType, bool] = {}  # whether it is on its own, and not part of other code

    def check(code: types.CodeType, names: dict[str, Any]) -> None:
        if code not in read:
            for inner in _check(code, names, asked):
                check(inner, names)
                read[inner] = False
        read.setdefault(code, True)

    def called(frame: types.FrameType, event: str, _: Any) -> None:
        code, name = frame.f_code, _module(frame)
        home = name.split(".")[0]
        if code in trusted:
            return
        if name == _CLASS:
            if code.co_name not in _ASKED and not _module(frame.f_back).startswith(_ASKING):
                refuse(f"calls {code.co_name} of a module")
        elif home in _TRUSTED or home in _STANDARD:
            if name in _REFUSED:
                refuse(_REFUSED[name])
            trusted.add(code)
        else:
            try:
                check(code, frame.f_globals)
                for free in code.co_freevars if read[code] else ():
                    value = frame.f_locals.get(free)
                    if free != "__class__" and type(value) not in CONSTANTS:
                        check_value(free, value)
            except Refused as refusal:
                refuse(str(refusal))

    before, collecting = sys.gettrace(), gc.isenabled()
    gc.disable()  # what it calls is not called by the code
    sys.settrace(called)
    try:
        yield asked
    finally:
        sys.settrace(before)
        if collecting:
            gc.enable()


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Reads no code meanwhile."""
    reader = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(reader)


def _module(frame: types.FrameType | None) -> str:
    return str(frame.f_globals.get("__name__", "")) if frame else ""


def _check(code: types.CodeType, names: dict[str, Any], asked: set[str]) -> list[types.CodeType]:
    """That code does nothing that a trace would lose; returns the code of what it defines."""
    constant: Any = ...
    owner: Any = None  # what has been loaded, of what has a name outside the code
    parent = False  # whether the next attribute is super's
    for step in dis.get_instructions(code):
        kind, value = step.opname, step.argval
        if kind in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            continue
        attribute = kind in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
        if reason := _statement(kind):
            raise Refused(reason)
        if kind == "IS_OP" and constant is not None:
            raise Refused("asks what a value is")
        outside = kind == "STORE_DEREF" and value in code.co_freevars
        if outside or kind in ("STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR", "DELETE_GLOBAL"):
            raise Refused(f"sets {value}")
        if attribute and value in _STATES:
            raise Refused(f"asks for {value}")
        if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            if value in names:
                owner = check_value(value, names[value])
            else:
                _check_builtin(value)
                asked.add(value)
                owner, parent = None, parent or value == "super"
        elif attribute and parent:
            if value != "forward":
                raise Refused(f"asks for {value} of super")
            parent = False
        elif attribute and owner is not None:
            owner = _of(owner, value)
        else:
            owner = None
        constant = value if kind == "LOAD_CONST" else ...
    return [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]


def _statement(kind: str) -> str:
    """Why an instruction is part of no code that is told by a trace."""
    if kind in ("SETUP_FINALLY", "PUSH_EXC_INFO"):
        return "has a with or try statement"
    if "WITH" in kind:
        return "has a with statement"
    if kind.startswith("MATCH_"):
        return "has a match statement"
    return "imports something" if kind.startswith("IMPORT_") else ""


def _check_builtin(name: str) -> None:
    value = vars(builtins).get(name)
    exception = isinstance(value, type) and issubclass(value, Exception)
    if name not in _BUILTINS and not exception:
        raise Refused(f"calls {name}")


def check_value(name: str, value: Any) -> Any:
    """Of a name outside the code: modules, functions, whose code is read as it runs, and classes.

    Returns it if attributes of it need to be looked at.
    """
    if isinstance(value, types.ModuleType):
        if value.__name__.split(".")[0] not in _TRUSTED:
            raise Refused(f"uses the module {value.__name__}")
    elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        # A builtin function belongs to a module, or to an object or class of one.
        owner = value if value.__module__ else getattr(value, "__self__", None)
        home = str(getattr(owner, "__module__", "")).split(".")[0]
        if home in _TRUSTED:
            state = value.__name__.startswith(_STATE) and not value.__name__.startswith("__")
            if (state and value.__name__ not in _ANSWERED) or value.__name__ in _STATES:
                raise Refused(f"asks for {value.__name__}")
        elif home in _STANDARD or not isinstance(value, types.FunctionType):
            raise Refused(f"calls {name} of {home}")
        else:
            check_defaults(value)
    elif isinstance(value, type):
        home = value.__module__.split(".")[0]
        written = value.__flags__ & 1 << 9  # in Python
        if home not in _TRUSTED and (home in _STANDARD or not written):
            raise Refused(f"uses the class {name} of {home}")
    else:
        raise Refused(f"reads {name}, a {type(value).__name__} that is not its own")
    return value


def check_defaults(function: types.FunctionType) -> None:
    """That the defaults of a function's arguments cannot change."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    for value in defaults:
        if type(value) not in CONSTANTS and not (type(value) is tuple and not value):
            raise Refused(f"has a default, {value!r}, that can change")


def _of(owner: Any, name: str) -> Any:
    """What an attribute of a module, function or class is, as by `check_value`."""
    if isinstance(owner, types.ModuleType):
        value = getattr(owner, name, None)
        if type(value) in (float, torch.dtype, torch.memory_format, torch.layout):
            return None
        return check_value(f"{owner.__name__}.{name}", value)
    value = getattr(owner, name, None)
    trusted = str(getattr(owner, "__module__", "")).split(".")[0] in _TRUSTED
    if isinstance(owner, type) and (trusted or isinstance(value, types.FunctionType)):
        return None if not isinstance(value, types.FunctionType) else check_value(name, value)
    raise Refused(f"reads {name} of {getattr(owner, '__name__', owner)}")
