"""Which forwards a trace tells, and what is looked at again before it is used."""

import copy
import enum
import functools
import inspect
import pickle
import random
import sys
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import of_no_kernel
from torch import nn, randn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

of_no_kernel()

from tribn.trace import Guard, Refused, trace, watching


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Base(nn.Module):
    """What a module may have that is computed, once or each time."""

    @classmethod
    def kind(cls):
        return 1.0

    @functools.cached_property
    def kept(self):
        return 1.0

    @functools.lru_cache(None)  # noqa: B019  that it keeps what it gets is why it is refused
    def cached(self, x):
        return x


def net(forward, **values):
    """A module with this forward and these attributes."""
    model = type("Net", (Base,), {"forward": forward})()
    model.bn = nn.BatchNorm1d(3)
    for name, value in values.items():
        setattr(model, name, value)
    return model


def traced(module):
    with watching():
        return trace(module)


def swallows(self, x):
    try:
        positive = bool(x.sum() > 0)
    except Exception:
        positive = True
    return self.bn(x) if positive else x


def counts(self, x):
    self.count += 1
    return self.bn(x)


def appends(self, x):
    self.seen.append(1)
    return self.bn(x)


def prints(self, x):
    print("forward")
    return self.bn(x)


def without_gradient(self, x):
    with torch.no_grad():
        return self.bn(x)


def mixed(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.bn(x)


def loops(self, x):
    for row in x:
        x = self.bn(row)
    return x


def asks_for_a_type(self, x):
    y = self.bn(x)
    return y if isinstance(y, torch.Tensor) else y[0]


def as_dictionary(self, x):
    return self.bn(**x)


def writes(self, x):
    y = self.bn(x)
    y[0] = x
    return y


class Output(dict):
    pass


elsewhere = nn.BatchNorm1d(3)

LOG, FLAG = [], True


class Mode(enum.Enum):
    A = 1


def tries(self, x):
    try:
        x = x.foo
    except AttributeError:
        x = x * 2
    return self.bn(x)


def logs(self, x):
    LOG.append(1)
    return self.bn(x)


def around():
    seen = []

    def forward(self, x):
        seen.append(1)
        return self.bn(x)

    return forward


def sets_modes(self, x):
    torch.set_grad_enabled(False)
    return self.bn(x)


def profiles(self, x):
    torch.profiler.record_function("f").__enter__()
    return self.bn(x)


def of_another(self, x):
    return self.helper(x)


class Holder:
    rate = 2.0


def tagged(x):
    return x


tagged.tag = 2.0


class Fills(nn.Module):
    found = 0.0

    def forward(self, x, into=None):
        self.found += 1.0
        if into is not None:
            into["x"] = x
        return x


def asks_its_parent(self, x):
    return self.bn(x) * super(Base, self).eps


def matches(self, x):
    match self.count:
        case [_, _]:
            return x
    return self.bn(x)


def imports(self, x):
    import os

    return self.bn(x) if os.environ else x


def sets_a_closure():
    seen = 0

    def forward(self, x):
        nonlocal seen
        seen += 1
        return self.bn(x)

    return forward


def has_a_default(self, x, seen=[]):  # noqa: B006  such a default is why it is refused
    seen.append(1)
    return self.bn(x)


@torch.no_grad()
def decorated(self, x):
    return self.bn(x)


REFUSED = {
    "depends on the value": lambda self, x: self.bn(x) if x.sum() > 0 else x,
    "depends on the value or the shape": lambda self, x: self.bn(x) if x.shape[0] > 1 else x,
    "has a with or try statement": swallows,
    "has a with or try statement|with statement": tries,
    "loops over a value": loops,
    "takes a dictionary apart": as_dictionary,
    "asks for the type of a value": asks_for_a_type,
    "is compiled, or kept": lambda self, x: checkpoint(self.bn, self.bn(x), use_reentrant=False),
    "reads apply of Reverse": lambda self, x: self.bn(Reverse.apply(x)),
    "sets count": counts,
    "calls setattr": lambda self, x: setattr(self.settings, "rate", 1) or self.bn(x),
    "calls train of a module": lambda self, x: self.train() and self.bn(x),
    "changes values of its own": appends,
    "calls print": prints,
    "has a with": without_gradient,
    "has a with ": mixed,
    "changes a mode": sets_modes,
    "changes a mode, such as no_grad": decorated,
    "is profiled": profiles,
    "asks for is_grad": lambda self, x: self.bn(x) if torch.is_grad_enabled() else x,
    "asks for is_compiling": lambda self, x: self.bn(x) if torch.compiler.is_compiling() else x,
    "asks for rand": lambda self, x: self.bn(x) if torch.rand(()) < 0.5 else x,
    "asks for randn": lambda self, x: self.bn(x) + randn(3),
    "asks for uniform_": lambda self, x: self.bn(x) if torch.empty(()).uniform_() < 0.5 else x,
    "uses the module random": lambda self, x: self.bn(x) if random.random() < 0.5 else x,
    "uses the module numpy": lambda self, x: self.bn(x) if np.random.rand() < 0.5 else x,
    "calls perf_counter of time": lambda self, x: self.bn(x) if perf_counter() > 0 else x,
    "calls deepcopy of copy": lambda self, x: self.bn(deepcopy(x)),
    "asks for children": lambda self, x: [x := m(x) for m in self.children()][-1],
    "asks what a value is": lambda self, x: self.bn(x) if self.use is True else x,
    "asks what mode is": lambda self, x: self.bn(x) if self.mode == self.use else x,
    "reads A of Mode": lambda self, x: self.bn(x) if self.mode is Mode.A else x,
    "reads rate of Holder": lambda self, x: self.bn(x) * Holder.rate,
    "reads tag of tagged": lambda self, x: self.bn(x) * tagged.tag,
    "reads kind, a classmethod": lambda self, x: self.bn(x) * self.kind(),
    "asks for eps of super": asks_its_parent,
    "reads kept, a cached_property": lambda self, x: self.bn(x) * self.kept,
    "reads cached, a _lru_cache_wrapper": lambda self, x: self.bn(self.cached(x)),
    "calls drawn of random": lambda self, x: self.bn(x) if self.drawn() < 0.5 else x,
    "uses the class Path of pathlib": lambda self, x: self.bn(x) if Path(".").exists() else x,
    "has a match statement": matches,
    "imports something": imports,
    "sets seen": sets_a_closure(),
    r"has a default, \[\], that": has_a_default,
    "writes a value as text": lambda self, x: self.bn(x) * (2 if str(x.dtype) == "half" else 1),
    "writes a value as": lambda self, x: self.bn(x) * (2 if f"{x.dtype}" == "half" else 1),
    "gives a list or dictionary to": lambda self, x: self.bn(self.fills(x, {})),
    "reads found of a module that it has called": lambda self, x: self.fills(x) * self.fills.found,
    "calls the forward of a module": lambda self, x: self.bn.forward(x),
    "asks for get_default_dtype": lambda self, x: self.bn(x.to(torch.get_default_dtype())),
    "reads torch.backends.cudnn.enabled, a bool": lambda self, x: (
        self.bn(x) if torch.backends.cudnn.enabled else x
    ),
    "raises TypeError when it is traced: unsupported": lambda self, x: self.bn(x) + 2 * self.number,
    "asks what use": lambda self, x: self.bn(x) if self.use else x,
    "asks a value for mask": lambda self, x: self.bn(x) if hasattr(x, "mask") else x,
    "asks a value for foo": lambda self, x: self.bn(x.foo),
    "looks up by a value": lambda self, x: self.bn(x) * {4: 2.0}.get(x.dim(), 1.0),
    "asks what settings is": lambda self, x: self.bn(x) if isinstance(self.settings, int) else x,
    "asks what mode": lambda self, x: self.bn(x) if str(self.mode) == "Mode.A" else x,
    "asks what mode i": lambda self, x: self.bn(x) if f"{self.mode}" == "Mode.A" else x,
    "calls type": lambda self, x: self.bn(x) if type(x) is torch.Tensor else x,
    "makes a tensor of its own": lambda self, x: self.bn(x) * torch.ones(3),
    "makes a Output": lambda self, x: Output(y=self.bn(x)),
    "takes \\*x": lambda self, *x: self.bn(x[0]),
    "raises KeyError": lambda self, **x: self.bn(x["x"]),
    "takes x by name alone": lambda self, *, x: self.bn(x),
    "reads LOG, a list that is not its own": logs,
    "reads FLAG, a bool": lambda self, x: self.bn(x) if FLAG else x,
    "reads seen, a list": around(),
    "reads elsewhere, a BatchNorm1d that is not its own": lambda self, x: elsewhere(x),
    "reads helper, a method of another object": of_another,
    "reads settings.bn, a BatchNorm1d": lambda self, x: self.settings.bn(x),
    "reads plain, a tensor": lambda self, x: self.bn(x) if self.plain > 0 else x,
    "raises ZeroDivisionError": lambda self, x: self.bn(x) / (1 // 0),
    "raises TypeError": writes,
}


def within(function):
    """A forward that only calls another function."""

    def forward(self, x):
        return function(self, x)

    return forward


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_graph_does_not_tell_is_refused(reason, inside, capsys):
    forward = REFUSED[reason]
    if inside:
        kind = list(inspect.signature(forward).parameters.values())[1].kind
        if kind != inspect._POSITIONAL_OR_KEYWORD:
            return
        forward = within(forward)
    settings = SimpleNamespace(bn=elsewhere, rate=0)
    values = {"count": 0, "seen": [], "mode": Mode.A, "use": np.bool_(False)}
    values |= {"drawn": random.random, "fills": Fills(), "number": np.float64(2)}
    model = net(forward, **values, settings=settings, plain=torch.ones(()))
    model.helper = elsewhere.forward
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    modes = [m.training for m in model.modules()]
    with pytest.raises(Refused, match=reason):
        traced(model)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert (model.count, model.seen, settings.rate, LOG) == (0, [], 0, [])
    assert capsys.readouterr().out == ""


def test_nothing_is_left_of_tracing():
    before = sys.getprofile()
    traced(net(lambda self, x: self.bn(x)))
    assert "__getattribute__" not in vars(nn.Module)
    assert sys.getprofile() is before


def guards(module):
    return {(*guard.path, guard.name): guard.value for t in traced(module) for guard in t.guards}


def norm(self, x):
    return self.bn(x)


def test_what_is_read_is_guarded():
    def forward(self, x):
        if self.skip is None and self.bn.affine:
            x = F.dropout(x, self.rate) * len(self.widths)
        for module in self.parts:
            x = module(x)
        return self.act(self.norm(x)) * self.settings.scale

    model = net(
        forward,
        skip=None,
        rate=0.5,
        widths=[1, (2, 3)],
        act=F.relu,
        unread=1,
        parts=nn.ModuleList([nn.Identity()]),
        settings=SimpleNamespace(scale=2.0, unread=1),
    )
    type(model).norm = norm
    assert guards(model) == {
        ("skip",): None,
        ("bn", ""): True,
        ("norm.__func__",): norm,
        ("bn", "affine"): True,
        ("parts", ""): True,
        ("rate",): 0.5,
        ("widths",): [1, (2, 3)],
        ("act",): F.relu,
        ("parts", "_modules"): (("0", True),),
        ("settings.__class__",): SimpleNamespace,
        ("settings.scale",): 2.0,
    }
    (t,) = traced(model)
    bn = model.bn

    def holds():
        return all(guard.holds(model) for guard in t.guards)

    assert holds()
    for change, undo in (
        (lambda: setattr(model, "skip", 1), lambda: setattr(model, "skip", None)),
        (lambda: setattr(model, "rate", 0.1), lambda: setattr(model, "rate", 0.5)),
        (lambda: model.widths.append(1), lambda: model.widths.pop()),
        (lambda: setattr(model, "act", F.silu), lambda: setattr(model, "act", F.relu)),
        (lambda: model.parts.append(nn.ReLU()), lambda: model.parts.pop(1)),
        (
            lambda: setattr(model.settings, "scale", 2),
            lambda: setattr(model.settings, "scale", 2.0),
        ),
        (lambda: delattr(model, "rate"), lambda: setattr(model, "rate", 0.5)),
        (lambda: setattr(model, "bn", None), lambda: setattr(model, "bn", bn)),
        (lambda: delattr(model, "bn"), lambda: setattr(model, "bn", bn)),
    ):
        change()
        assert not holds()
        undo()
        assert holds()
    model.unread = model.settings.unread = 2
    assert holds()
    assert all(g.holds(copy.deepcopy(model)) for g in pickle.loads(pickle.dumps(t.guards)))
    assert not Guard(("nowhere",), "rate", 0.5).holds(model)


def test_both_modes_are_traced_if_the_mode_is_read():
    assert len(traced(net(lambda self, x: self.bn(x)))) == 1
    model = net(lambda self, x: F.dropout(self.bn(x), 0.5, self.training)).eval()
    model.bn.train()
    evaluation, training = traced(model)
    assert "training = False" in evaluation.graph.python_code("self").src
    assert "training = True" in training.graph.python_code("self").src
    assert not model.training
    assert model.bn.training


def test_operators_in_place_are_in_place():
    def forward(self, x):
        x = x * 1
        kept = x
        x += 1
        x -= 2
        x *= 3
        x /= 2
        return kept

    (t,) = traced(net(forward))
    scope = {}
    exec(t.graph.python_code("self").src, scope)
    x = torch.randn(4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scope["forward"](None, x), (x - 1) * 1.5)
