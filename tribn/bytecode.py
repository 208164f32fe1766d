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

CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, slice, range)

# What code may ask for by name, besides torch's functions, its own, and classes
_BUILTINS = frozenset(
    (
        *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "float", "getattr"),
        *("hasattr", "int", "isinstance", "len", "list", "map", "max", "min", "range"),
        *("reversed", "round", "slice", "sorted", "str", "sum", "super", "tuple", "zip"),
    )
)

# Packages whose code is not read, but for these modules of torch
_TRUSTED = (
    *("torch", "tribn", "einops", "builtins", "math", "operator", "_operator", "functools"),
    *("_functools", "typing", "collections", "enum", "abc"),
)
_STANDARD = sys.stdlib_module_names
_UNREAD = frozenset(_TRUSTED) | _STANDARD
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
_ASKING = ("torch.fx", _CLASS)

# Questions whose answers a graph does not ask for again, ways past modules, and random numbers
_STATES = frozenset(
    (
        *("is_compiling", "is_exporting", "is_dynamo_compiling", "is_in_onnx_export"),
        *("is_tracing", "is_autocast_enabled", "is_grad_enabled", "is_inference_mode_enabled"),
        *("is_initialized", "backends", "__dict__", "__class__", "children", "modules"),
        *("parameters", "buffers", "named_children", "named_modules", "named_parameters"),
        *("named_buffers", "rand", "randn", "randint", "randperm", "rand_like", "randn_like"),
        *("randint_like", "normal", "bernoulli", "multinomial", "poisson", "rrelu", "uniform_"),
        *("normal_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_"),
        "log_normal_",
    )
)


class Refused(Exception):
    """Why a forward cannot be told from its trace, in words that follow its name."""


@contextlib.contextmanager
def reading(refuse: Callable[[str], None]) -> Iterator[set[str]]:
    """Reads code before it runs in this thread, and gives the names of builtins that it asks for.

    Calls `refuse`, which raises, with what a trace would lose. A profiler in Python is set aside.
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
        if event != "call" or code in trusted:
            return
        if name == _CLASS:
            if code.co_name not in _ASKED and not _module(frame.f_back).startswith(_ASKING):
                refuse(f"calls {code.co_name} of a module")
        elif name.split(".")[0] in _UNREAD:
            if name in _REFUSED:
                refuse(_REFUSED[name])
            trusted.add(code)
        else:
            try:
                check(code, frame.f_globals)
                for free in code.co_freevars if read[code] else ():
                    value = frame.f_locals.get(free)
                    if free != "__class__" and not isinstance(value, CONSTANTS):
                        _check_value(free, value)
            except Refused as refusal:
                refuse(str(refusal))

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # what it calls is not called by the code
    sys.setprofile(called)
    try:
        yield asked
    finally:
        sys.setprofile(before if callable(before) else None)
        if collecting:
            gc.enable()


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Reads no code meanwhile."""
    reader = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(reader)


def _module(frame: types.FrameType | None) -> str:
    return str(frame.f_globals.get("__name__", "")) if frame else ""


def _check(code: types.CodeType, names: dict[str, Any], asked: set[str]) -> list[types.CodeType]:
    """That code does nothing that a trace would lose; returns the code of what it defines."""
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
            if value in names:
                _check_value(value, names[value])
            else:
                _check_builtin(value)
                asked.add(value)
        if not kind.startswith(("CACHE", "EXTENDED_ARG")):
            constant = value if kind == "LOAD_CONST" else ...
    return [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]


def _check_builtin(name: str) -> None:
    value = vars(builtins).get(name)
    exception = isinstance(value, type) and issubclass(value, Exception)
    if name not in _BUILTINS and not exception:
        raise Refused(f"calls {name}")


def _check_value(name: str, value: Any) -> None:
    """Of a name from outside the code: functions, whose code is read as it runs, and classes."""
    if isinstance(value, types.ModuleType):
        if value.__name__.split(".")[0] not in _TRUSTED:
            raise Refused(f"uses the module {value.__name__}")
    elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        # A builtin function belongs to a module, or to an object or class of one.
        owner = value if value.__module__ else getattr(value, "__self__", None)
        home = str(getattr(owner, "__module__", "")).split(".")[0]
        builtin = isinstance(value, types.BuiltinFunctionType)
        if home not in _TRUSTED and (builtin or home in _STANDARD):
            raise Refused(f"calls {name} of {home}")
        if value.__name__ in _STATES:
            raise Refused(f"asks for {value.__name__}")
    elif not isinstance(value, type):
        raise Refused(f"reads {name}, a {type(value).__name__} that is not its own")
