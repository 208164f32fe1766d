"""What is fused with a batch norm, what is not, and that neither makes a difference."""

import copy
import cProfile
import pickle
import pstats
import sys
import types
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import ACTIVATIONS, EXACT, of_no_kernel
from resnet import Residual, ResNet
from torch import nn
from torch.nn import functional as F
from training import assert_train_alike

of_no_kernel()

import tribn
from perf import networks

X = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def net(forward, **modules):
    """A module with this forward, a few layers it may use, and others."""
    torch.manual_seed(0)
    model = type("Net", (nn.Module,), {"forward": forward})()
    layers = {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), "relu": nn.ReLU()}
    for name, module in (layers | modules).items():
        setattr(model, name, module)
    return model


def conv_bn():
    return [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)]


def convert(model):
    """The model, and what its layers were fused with, by name; without the empty ones."""
    model, report = tribn.convert(model, report=True)
    return model, {row.name: row.into for row in report.rows if row.into}


def why(model):
    """Why the one layer of a model is not fused."""
    (row,) = tribn.convert(model, report=True)[1].rows
    assert row.what == "replaced"
    assert not row.into
    return row.why


def check(model, fused, *inputs, original=None):
    """That convert fuses just so, and the model trains as before, or as the original."""
    converted, into = convert(copy.deepcopy(model).double())
    assert into == fused
    assert_train_alike(converted, original or model, inputs or (X,))


class Hardsigmoid(nn.Module):
    """torch's has 1/6 in float32 in its gradient, whatever the dtype."""

    def forward(self, z):
        return EXACT["hardsigmoid"](z)


@pytest.fixture
def calls(monkeypatch):
    """What each call of a batch norm is fused with: the activation's name, whether a residual."""
    seen = []
    real = tribn.nn.normalize

    def normalize(tensors, numbers, *rest):
        seen.append((numbers[4].name, tensors[1] is not None))
        return real(tensors, numbers, *rest)

    monkeypatch.setattr(tribn.nn, "normalize", normalize)
    return seen


# Activations


WRITTEN = [
    (name, in_place)
    for name, act in ACTIVATIONS.items()
    for in_place in (False, True)
    if hasattr(act, "inplace") or not in_place
]


@pytest.mark.parametrize(("name", "in_place"), WRITTEN)
def test_modules_of_a_sequential(name, in_place, calls):
    act = copy.deepcopy(ACTIVATIONS[name])
    act.inplace = in_place
    model = nn.Sequential(*conv_bn(), act)
    original = nn.Sequential(*model[:2], Hardsigmoid()) if name == "hardsigmoid" else model
    check(model, {"1": str(tribn.activation.parse(act))}, original=original)
    assert set(calls) == {(name, False)}


FUNCTIONS = {
    "F.relu": (lambda z: F.relu(z), "relu"),
    "F.relu in place": (lambda z: F.relu(z, inplace=True), "relu"),
    "F.relu with True": (lambda z: F.relu(z, True), "relu"),
    "F.relu_": (lambda z: F.relu_(z), "relu"),
    "torch.relu": (lambda z: torch.relu(z), "relu"),
    "torch.relu_": (lambda z: torch.relu_(z), "relu"),
    "relu": (lambda z: z.relu(), "relu"),
    "relu_": (lambda z: z.relu_(), "relu"),
    "F.relu6": (lambda z: F.relu6(z), "relu6"),
    "F.leaky_relu": (lambda z: F.leaky_relu(z), "leaky_relu(negative_slope=0.01)"),
    "its slope": (lambda z: F.leaky_relu(z, 0.2), "leaky_relu(negative_slope=0.2)"),
    "by name": (
        lambda z: F.leaky_relu(z, negative_slope=0.3, inplace=True),
        "leaky_relu(negative_slope=0.3)",
    ),
    "F.elu": (lambda z: F.elu(z, 0.5), "elu(alpha=0.5)"),
    "F.elu_": (lambda z: F.elu_(z), "elu(alpha=1.0)"),
    "F.gelu": (lambda z: F.gelu(z), "gelu"),
    "F.gelu with tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
    "F.silu": (lambda z: F.silu(z, inplace=True), "silu"),
    "F.mish": (lambda z: F.mish(z), "mish"),
    "torch.sigmoid": (lambda z: torch.sigmoid(z), "sigmoid"),
    "F.sigmoid": (lambda z: F.sigmoid(z), "sigmoid"),
    "sigmoid_": (lambda z: z.sigmoid_(), "sigmoid"),
    "torch.tanh": (lambda z: torch.tanh(z), "tanh"),
    "tanh": (lambda z: z.tanh(), "tanh"),
    "F.softplus": (lambda z: F.softplus(z, 2, 10), "softplus(beta=2.0, threshold=10.0)"),
    "F.hardswish": (lambda z: F.hardswish(z), "hardswish"),
    "F.hardsigmoid": (lambda z: F.hardsigmoid(z), "hardsigmoid"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods(name, calls):
    act, into = FUNCTIONS[name]
    original = net(lambda self, x: EXACT.get(into, act)(self.bn(self.conv(x))))
    check(net(lambda self, x: act(self.bn(self.conv(x)))), {"bn": into}, original=original)
    assert set(calls) == {(into.split("(")[0], False)}


OTHERS = {
    "prelu": lambda self, z: self.act(z),
    "another": lambda self, z: F.selu(z),
    "by what is computed": lambda self, z: F.leaky_relu(z, self.conv.weight.mean().item()),
    "of two": lambda self, z: F.elu_(z, 1.0, 2.0),
    "turned": lambda self, z: z.mT.relu(),
    "an argument": lambda self, z: torch.sub(torch.ones_like(z), z),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_not_fused(name):
    forward = OTHERS[name]
    model = net(lambda self, x: forward(self, self.bn(self.conv(x))), act=nn.PReLU())
    check(model, {})


# Sums

SUMS = {
    "z + x": lambda z, x: z + x,
    "x + z": lambda z, x: x + z,
    "torch.add": lambda z, x: torch.add(z, x),
    "torch.add of x": lambda z, x: torch.add(x, z, alpha=1),
    "add": lambda z, x: z.add(x),
    "add of x": lambda z, x: x.add(z),
    "add_": lambda z, x: z.add_(x),
}


def plus_equal(self, x):
    z = self.bn(self.conv(x))
    z += x
    return z


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("activation", [True, False])
def test_sums(name, activation, calls):
    add = SUMS[name]

    def forward(self, x):
        z = add(self.bn(self.conv(x)), x)
        return self.relu(z) if activation else z

    check(net(forward), {"bn": "residual, relu" if activation else "residual"})
    assert set(calls) == {("relu" if activation else None, True)}


def test_augmented_sums(calls):
    check(net(plus_equal), {"bn": "residual"})
    check(net(lambda self, x: self.relu(plus_equal(self, x))), {"bn": "residual, relu"})
    assert set(calls) == {(None, True), ("relu", True)}


def into_x(self, x):
    y = x * 2
    kept = y
    y += self.bn(self.conv(x))
    return self.relu(y) + kept


OTHER_SUMS = {
    "alpha": lambda self, x: torch.add(self.bn(self.conv(x)), x, alpha=2),
    "a number": lambda self, x: self.bn(self.conv(x)) + 1,
    "twice itself": lambda self, x: (lambda z: z + z)(self.bn(self.conv(x))),
    "into the other": into_x,
    "a difference": lambda self, x: self.bn(self.conv(x)) - x,
    "of itself": lambda self, x: (lambda z: z + self.conv(z))(self.bn(x)),
}


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_other_sums_are_not_fused(name):
    check(net(OTHER_SUMS[name]), {})


def test_one_of_two_batch_norms_takes_the_other_as_residual(calls):
    model = net(
        lambda self, x: self.relu(self.bn(self.conv(x)) + self.other(x)),
        other=nn.BatchNorm2d(3),
    )
    check(model, {"other": "residual, relu"})
    assert set(calls) == {("relu", True), (None, False)}


def test_a_sum_of_three_takes_one_residual():
    model = net(lambda self, x: self.relu(self.bn(self.conv(x)) + x + x * 2))
    check(model, {"bn": "residual"})


SHAPES = [(shape, place) for shape in [(1, 3, 1, 1), (4, 1, 1, 5), ()] for place in (False, True)]


@pytest.mark.parametrize(("shape", "in_place"), [*SHAPES, ((2, 4, 3, 6, 5), False)])
def test_a_residual_of_another_shape_is_added_by_itself(shape, in_place, calls):
    def forward(self, x, y):
        z = self.bn(self.conv(x))
        if in_place:
            z += y
        else:
            z = z + y
        return self.relu(z)

    model = net(forward)
    check(model, {"bn": "residual, relu"}, X, torch.ones(shape))
    assert set(calls) == {(None, False)}


def test_sums_keep_their_dtype(calls):
    for forward in (lambda self, x, y: self.bn(x) + y, lambda self, x, y: self.bn(x).add_(y)):
        model, into = convert(net(forward))
        assert into == {"bn": "residual"}
        plain = net(forward)
        for dtypes in ((torch.half, torch.float), (torch.float, torch.half)):
            x, y = (X.to(dtype) for dtype in dtypes)
            assert model(x, y).dtype == plain(x, y).dtype
    assert set(calls) == {(None, False)}


# Uses


def used_twice(self, x):
    z = self.bn(self.conv(x))
    return self.relu(z) * z


def used_after_in_place(self, x):
    z = self.bn(self.conv(x))
    y = F.relu(z, inplace=True)
    return z * 2 + y


def also_returned(self, x):
    z = self.bn(self.conv(x))
    return z, self.relu(z)


def sum_used_twice(self, x):
    z = self.bn(self.conv(x)) + x
    return self.relu(z) * z


def test_what_is_used_twice_is_not_fused():
    for forward in (used_twice, used_after_in_place, also_returned):
        check(net(forward), {})
        assert why(net(forward)) == "its output is used 2 times"
    check(net(sum_used_twice), {"bn": "residual"})


def test_a_shared_activation_is_fused_everywhere_and_stays_usable(calls):
    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = self.relu(self.bn2(self.conv(x)))
        return self.relu(self.conv(x))

    model = net(forward, bn2=nn.BatchNorm2d(3), relu=nn.ReLU(inplace=True))
    check(model, {"bn": "relu", "bn2": "relu"})
    assert set(calls) == {("relu", False)}


def test_each_call_of_a_shared_batch_norm_is_fused_by_itself(calls):
    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = torch.tanh(self.bn(self.conv(x)) + x)
        return self.bn(self.conv(x)).abs()

    check(net(forward), {"bn": "relu; residual, tanh"})
    assert calls[-3:] == [("relu", False), ("tanh", True), (None, False)]


def test_running_statistics_keep_the_order_of_a_shared_batch_norm():
    def forward(self, x):
        z = self.bn(self.conv(x))
        return z + self.part(x * 3)

    bn = nn.BatchNorm2d(3)
    check(net(forward, bn=bn, part=nn.Sequential(bn, nn.Conv2d(3, 3, 1))), {})


def test_a_call_does_not_wait_for_one_that_changes_its_input():
    def forward(self, x):
        x = x * 1
        z = self.bn(x)
        return z + self.part(x)

    model = net(forward, part=nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)))
    expected = copy.deepcopy(model).eval()(X.clone())
    converted = copy.deepcopy(model).eval()
    assert why(converted) == "what is computed in between may change what goes in"
    with torch.no_grad():
        torch.testing.assert_close(converted(X.clone()), expected)

    def by_method(self, x):
        x = x * 1
        z = self.bn(x)
        x.mul_(2)
        return self.relu(z + x)

    with torch.no_grad():
        model = net(by_method).eval()
        expected = model(X.clone())
        converted, into = convert(model)
        assert not into
        torch.testing.assert_close(converted(X.clone()), expected)


@pytest.mark.parametrize(
    "drop", [lambda self, x: self.drop(x), lambda self, x: F.dropout(x, 0.5, self.training)]
)
def test_random_numbers_are_drawn_in_the_same_order(drop):
    body = nn.Sequential(nn.Dropout(), *conv_bn())
    check(net(lambda self, x: self.body(x) + drop(self, x), body=body, drop=nn.Dropout()), {})
    one = net(lambda self, x: self.bn(self.conv(x)) + drop(self, x), drop=nn.Dropout())
    check(one, {"bn": "residual"})


def test_identities_in_between_are_passed_by_while_they_are_such(calls):
    def forward(self, x):
        return self.relu(self.between(self.bn(self.conv(x))) + x)

    model = net(forward, between=nn.Identity())
    check(model, {"bn": "residual, relu"})
    assert set(calls) == {("relu", True)}
    model = tribn.convert(model).eval()
    model.between = nn.Tanh()
    torch.testing.assert_close(model(X), tribn.revert(copy.deepcopy(model))(X))
    model.between = nn.Identity()
    seen = []
    model.between.register_forward_hook(lambda *_: seen.append(1))
    model(X)
    assert seen


# Across modules


class Block(nn.Module):
    def __init__(self, activation=None):
        super().__init__()
        self.conv, self.norm = conv_bn()
        self.activation = activation or nn.Identity()

    def forward(self, x):
        return self.activation(self.norm(self.conv(x)))


def residual(self, x):
    return self.relu(self.body(x) + x)


def test_what_a_module_ends_with_is_fused_with_what_follows_the_module(calls):
    body = nn.Sequential(Block(nn.SiLU()), nn.Sequential(Block()))
    check(net(residual, body=body), {"body.0.norm": "silu", "body.1.0.norm": "residual, relu"})
    assert set(calls) == {("silu", False), ("relu", True)}


def test_a_module_that_adds_takes_the_activation_of_its_caller(calls):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv_bn()

        def forward(self, x):
            return self.norm(self.conv(x)) + x

    model = net(lambda self, x: self.relu(self.body(x)), body=Adds())
    check(model, {"body.norm": "residual, relu"})
    assert set(calls) == {("relu", True)}
    # and no second residual
    model = net(residual, body=Adds())
    check(model, {"body.norm": "residual"})


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("adds", [False, True])
def test_identities_of_a_module_are_passed_by_from_outside(before, after, adds, calls):
    def body(self, x):
        z = self.bn(self.conv(x))
        z = self.before(z) if before else z
        z = z + x if adds else z
        return self.after(z) if after else z

    part = net(body, before=nn.Identity(), after=nn.Identity())
    model = net(lambda self, x: self.relu(self.part(x)), part=part)
    check(model, {"part.bn": "residual, relu" if adds else "relu"})
    assert set(calls) == {("relu", adds)}


def test_a_module_without_arguments(calls):
    part = net(lambda self: self.bn(self.conv(self.input)), input=nn.Parameter(X.clone()))
    model = net(lambda self, x: self.relu(self.part() + x), part=part)
    check(model, {"part.bn": "residual, relu"})
    assert set(calls) == {("relu", True)}


def test_a_module_called_twice_is_fused_where_it_can_be(calls):
    def forward(self, x):
        return self.body(self.relu(self.body(x) + x)).abs()

    check(net(forward, body=nn.Sequential(*conv_bn())), {"body.1": "residual, relu"})
    assert calls[-2:] == [("relu", True), (None, False)]


def test_hooks_on_a_module_see_what_they_saw(calls):
    seen = []
    model = net(residual, body=nn.Sequential(*conv_bn())).eval()
    expected = model.body(X)
    model = tribn.convert(model)
    model.body.register_forward_hook(lambda module, args, y: seen.append(y))
    y = model(X)
    torch.testing.assert_close(seen, [expected])
    torch.testing.assert_close(y, F.relu(expected + X))
    assert tribn.convert(model, report=True)[1].counts["fused"] == 0


def test_a_module_that_ends_otherwise_in_one_mode_is_not_followed():
    def body(self, x):
        z = self.bn(self.conv(x))
        return z if self.training else z * 2

    check(net(residual, body=net(body)), {})


def test_a_module_that_has_changed_is_followed_one_after_another(calls):
    def body(self, x):
        z = self.bn(self.conv(x))
        return z * 2 if self.double else z

    model = net(residual, body=net(body, double=False)).eval()
    model, into = convert(model)
    assert into == {"body.bn": "residual, relu"}
    model.body.double = True
    torch.testing.assert_close(model(X), F.relu(model.body(X) + X))
    model.body.double = False
    del calls[:]
    model(X)
    assert calls == [("relu", True)]
    tribn.convert(model.body)  # by itself, which does not know what follows
    torch.testing.assert_close(model(X), F.relu(model.body(X) + X))
    body = nn.Sequential(*conv_bn(), nn.ReLU(), *conv_bn())
    model = tribn.convert(net(residual, body=body).eval())
    tribn.convert(model.body)
    torch.testing.assert_close(model(X), F.relu(model.body(X) + X))


# Hooks on what is fused


def hook_everywhere(register):
    """The values that hooks on batch norm and activation see, before and after converting."""
    values = []
    for convert_it in (False, True):
        model = net(lambda self, x: self.relu(self.bn(self.conv(x)) + x)).eval()
        if convert_it:
            model = tribn.convert(model)
        seen = []
        for module in (model.bn, model.relu):
            register(module, seen)
        x = X.clone().requires_grad_()
        y = model(x)
        y.sum().backward()
        values.append([*seen, y.detach(), x.grad])
    return values


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, a, y: seen.append(y.clone())),
    "forward that changes": lambda m, seen: m.register_forward_hook(lambda m, a, y: y * 2),
    "before": lambda m, seen: m.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone())),
    "before, that changes": lambda m, seen: m.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "backward": lambda m, seen: m.register_full_backward_hook(
        lambda m, dx, dy: seen.append(dy[0].clone())
    ),
    "before backward": lambda m, seen: m.register_full_backward_pre_hook(
        lambda m, dy: seen.append(dy[0].clone())
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_see_and_do_what_they_did(name):
    before, after = hook_everywhere(HOOKS[name])
    assert len(before) == len(after) > 1
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", HOOKS)
def test_the_report_says_what_has_hooks(name):
    model = net(lambda self, x: self.relu(self.bn(self.conv(x))))
    HOOKS[name](model.bn, [])
    assert why(model) == "it has hooks"
    model = net(lambda self, x: self.relu(self.bn(self.conv(x))))
    HOOKS[name](model.relu, [])
    assert why(model) == "followed by ReLU with hooks"
    model = net(lambda self, x: self.relu(self.identity(self.bn(x))), identity=nn.Identity())
    HOOKS[name](model.identity, [])
    assert why(model) == "followed by Identity with hooks"


# What changes after converting


def test_parts_that_are_replaced_later_are_what_runs(calls):
    model = tribn.convert(net(lambda self, x: self.relu(self.bn(self.conv(x))))).eval()
    model.relu = nn.LeakyReLU(0.1)
    torch.testing.assert_close(model(X), F.leaky_relu(model.bn(model.conv(X)), 0.1))
    model.relu.negative_slope = 0.3
    torch.testing.assert_close(model(X), F.leaky_relu(model.bn(model.conv(X)), 0.3))
    assert calls[0] == calls[2] == ("leaky_relu", False)
    model.relu = nn.PReLU()
    torch.testing.assert_close(model(X), model.relu(model.bn(model.conv(X))))
    model.bn = nn.GroupNorm(1, 3)
    torch.testing.assert_close(model(X), model.relu(model.bn(model.conv(X))))
    model.bn = tribn.BatchNorm2d(3, activation="tanh")
    torch.testing.assert_close(model(X), model.relu(model.bn(model.conv(X))))


def test_values_that_forward_reads_are_looked_at_again(calls):
    def forward(self, x):
        z = self.bn(self.conv(x))
        if self.skip is not None:
            z = z + x
        return F.relu(z) if self.act == "relu" else F.dropout(z, self.rate) * self.widths[1]

    model = net(forward, skip=None, act="relu", rate=0.0, widths=[1, 2])
    model, into = convert(model.eval())
    assert into == {"bn": "relu"}
    z = model.bn(model.conv(X))
    torch.testing.assert_close(model(X), F.relu(z))
    model.act = "none"
    torch.testing.assert_close(model(X), z * 2)
    model.widths[1] = 3
    torch.testing.assert_close(model(X), z * 3)
    model.skip = nn.Identity()
    torch.testing.assert_close(model(X), (z + X) * 3)
    del calls[:]
    model.act, model.skip, model.widths[1] = "relu", None, 2
    model(X)
    assert calls == [("relu", False)]
    model.skip = nn.Identity()
    model, into = convert(model)
    assert into == {"bn": "residual, relu"}
    torch.testing.assert_close(model(X), F.relu(z + X))
    model.skip = None
    torch.testing.assert_close(model(X), F.relu(z))


def helper(self, z):
    return z


def another(self, z):
    return z * 2


def by_class(self, x):
    z = self.relu(self.bn(self.conv(x)))
    return z if isinstance(self.down, nn.Identity) else self.down(z)


def by_class_in_a_list(self, x):
    z = self.relu(self.bn(self.conv(x)))
    for part in self.parts:
        z = z if isinstance(part, nn.Identity) else part(z)
    return z


def by_parameter(self, x):
    z = self.relu(self.bn(self.conv(x)))
    return z if self.scale is None else z * self.scale


def by_attribute(self, x):
    z = self.relu(self.bn(self.conv(x)))
    return z * 2 if hasattr(self, "extra") else z


def by_setting(self, x):
    z = self.relu(self.bn(self.conv(x)))
    return z * getattr(self.settings, "scale", 1)


def set_in(name, value):
    """A change to a module, which may be one of its parts: 0 in "parts.0"."""

    def change(model):
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path) if path else model, last, value)

    return change


def set_in_class(name, value):
    return lambda model: setattr(base(model), name, value)


def base(model):
    return next(cls for cls in type(model).__mro__ if "forward" in vars(cls) and cls.count)


def by_number(self, x):
    z = self.relu(self.bn(self.conv(x)))
    return z * self.number


def by_order(self, x):
    z = self.relu(self.bn(self.conv(x)))
    for name, value in self.steps.items():
        z = z * value if name == "mul" else z + value
    return z


def reordered(model):
    model.steps = dict(reversed(model.steps.items()))


CHANGED_LATER = {
    "a parameter, to none": (
        lambda self, x: by_number(self, x) if self.number is not None else self.conv(x),
        set_in("number", None),
    ),
    "a parameter that is deleted": (
        lambda self, x: by_number(self, x) if hasattr(self, "number") else self.conv(x),
        lambda model: delattr(model, "number"),
    ),
    "one of two names for a parameter": (
        lambda self, x: by_number(self, x) * self.again,
        set_in("again", nn.Parameter(torch.ones(1) * 5)),
    ),
    "the order of a dictionary": (by_order, reordered),
    "that there is an object": (
        lambda self, x: by_number(self, x) if self.settings is not None else self.conv(x),
        set_in("settings", None),
    ),
    "a class by its namesake": (
        lambda self, x: by_number(self, x) if isinstance(self.down, nn.Identity) else self.conv(x),
        set_in("down", type("Identity", (nn.Tanh,), {})()),
    ),
    "a module under a second name": (
        lambda self, x: self.second(self.bn(self.conv(x))),
        set_in("second", nn.Tanh()),
    ),
    "a parameter that is none": (by_parameter, set_in("scale", nn.Parameter(torch.ones(1) * 3))),
    "an attribute that is not there": (by_attribute, set_in("extra", 1)),
    "a setting that is not there": (by_setting, lambda model: setattr(model.settings, "scale", 3)),
    "the class of a module": (by_class, set_in("down", nn.Tanh())),
    "the class of a module of a list": (by_class_in_a_list, set_in("parts.0", nn.Tanh())),
    "a method": (
        lambda self, x: self.helper(self.relu(self.bn(self.conv(x)))),
        set_in_class("helper", another),
    ),
    "the forward": (
        lambda self, x: self.relu(self.bn(self.conv(x))),
        set_in_class("forward", lambda self, x: self.conv(x)),
    ),
}


@pytest.mark.parametrize("what", CHANGED_LATER)
def test_what_a_forward_found_is_looked_at_again(what, calls):
    forward, change = CHANGED_LATER[what]
    outputs = []
    for converted in (False, True):
        model = net(forward, down=nn.Identity(), parts=nn.ModuleList([nn.Identity()])).eval()
        type(model).helper, type(model).count = helper, 1
        model.second, model.settings = model.relu, types.SimpleNamespace()
        model.number = model.again = nn.Parameter(torch.ones(1) * 2)
        model.steps = {"mul": 2, "add": 3}
        model.register_parameter("scale", None)
        if converted:
            model, into = convert(model)
            assert into == {"bn": "relu"}
        before = model(X)
        change(model)
        outputs.append((before, model(X)))
    assert calls[0] == ("relu", False)
    assert not torch.equal(*outputs[0])
    torch.testing.assert_close(*outputs)


def test_containers_that_forward_changes_stay_as_they_were():
    def forward(self, x):
        kept = self.kept
        kept.append(self.bn(x))
        return F.relu(kept[0])

    model = net(forward, kept=[])
    assert why(model) == "Net.forward changes values of its own"
    assert model.kept == []


def test_a_sum_of_two_layouts_has_the_layout_it_had(calls):
    x = X.to(memory_format=torch.channels_last)
    for forward in (lambda self, x, y: self.bn(x) + y, lambda self, x, y: y + self.bn(x)):
        plain, (model, into) = net(forward).eval(), convert(net(forward).eval())
        assert into == {"bn": "residual"}
        for inputs in ((x, X), (X, x), (x, x), (X, X)):
            assert model(*inputs).stride() == plain(*inputs).stride()
    assert calls.count((None, True)) == 4


def both(self, x):
    """What comes between a batch norm and its sum works on the input of the batch norm."""
    z = self.bn(x)
    return self.relu(z + self.between(x))


def set_inplace(model):
    model.between.inplace = True


def hook_in_between(model):
    model.between.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))


@pytest.mark.parametrize(
    "change", [set_in("between", nn.ReLU(inplace=True)), set_inplace, hook_in_between]
)
def test_what_comes_between_is_looked_at_again(change, calls):
    outputs = []
    for converted in (False, True):
        model = net(both, between=nn.ReLU()).eval()
        if converted:
            model, into = convert(model)
            assert into == {"bn": "residual, relu"}
            model(X.clone())
            assert calls[-1] == ("relu", True)
        change(model)
        with torch.no_grad():
            outputs.append(model(X.clone()))
    torch.testing.assert_close(*outputs)


def test_hooks_see_the_order_that_was_written():
    def forward(self, x):
        z = self.bn(self.conv(x))
        return self.relu(z + self.down(x))

    orders = []
    for converted in (False, True):
        model = net(forward, down=nn.Conv2d(3, 3, 1)).eval()
        model, order = tribn.convert(model) if converted else model, []
        for name, module in model.named_children():
            module.register_forward_hook(lambda *_, order=order, name=name: order.append(name))
        model(X)
        orders.append(order)
    assert orders[0] == orders[1] == ["conv", "bn", "down", "relu"]


class Stochastic(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


DRAW = {
    "attention": lambda: Stochastic(),
    "gumbel": lambda: Sampled(),
    "an LSTM": lambda: Recurrent(),
}


class Sampled(nn.Module):
    def forward(self, x):
        return F.gumbel_softmax(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.LSTM(5, 5, 2, dropout=0.5)

    def forward(self, x):
        return self.part(x.flatten(1, 2))[0].view_as(x)


@pytest.mark.parametrize("name", DRAW)
def test_random_numbers_of_other_modules_are_drawn_in_the_same_order(name):
    def forward(self, x):
        return self.relu(self.body(x) + self.other(x))

    body = nn.Sequential(nn.Dropout(), *conv_bn())
    check(net(forward, body=body, other=DRAW[name]()), {})


def test_a_module_that_head_and_residual_share_keeps_its_turns():
    conv = torch.nn.utils.spectral_norm(nn.Conv2d(3, 3, 1))  # which moves at each call

    def forward(self, x):
        return self.relu(self.body(x) + self.body[0](x))

    assert convert(net(forward, body=nn.Sequential(conv, nn.BatchNorm2d(3))))[1] == {}


class Unchanged(nn.Conv2d):
    def forward(self, x):
        return x


def test_what_goes_into_a_batch_norm_that_waits_is_its_own():
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y + self.relu(x)

    model = net(forward, conv=Unchanged(3, 3, 1), relu=nn.ReLU(inplace=True))
    assert convert(model)[1] == {}


def test_a_running_statistic_that_is_read_before_is_seen_to_move():
    def forward(self, x):
        mean = self.bn.running_mean
        y = self.bn(x)
        return F.relu(y + x * mean.sum())

    check(net(forward), {})


def test_what_goes_wrong_with_a_value_of_a_model_is_a_reason():
    model = nn.Sequential(*conv_bn(), nn.LeakyReLU())
    model[2].negative_slope = None
    assert why(model).startswith("Sequential.forward is not followed: float() argument must be")


class Listed(nn.ModuleList):
    def forward(self, x):
        for part in self:
            x = part(x)
        return x


def test_lists_that_have_a_forward_are_followed():
    check(Listed([*conv_bn(), nn.ReLU()]), {"1": "relu"})


def test_arguments_by_name_are_a_reason():
    reason = "it is called with arguments by their names"
    assert why(net(lambda self, x: self.relu(self.bn(input=x)))) == reason


class OtherState(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x))

    def __getstate__(self):
        return (vars(self).copy(),)

    def __setstate__(self, state):
        vars(self).update(state[0])


def test_states_that_are_no_dictionaries_are_copied():
    model = tribn.convert(OtherState()).eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(X), model(X))


def test_an_activation_in_place_writes_where_a_batch_norm_was_replaced():
    def forward(self, x):
        y = x * 1
        return F.relu(self.bn(y), inplace=True) + y

    outputs = []
    for converted in (False, True):
        model = tribn.convert(net(forward)) if converted else net(forward)
        model.bn = nn.Identity()
        outputs.append(model(X))
    torch.testing.assert_close(*outputs)


def test_a_part_whose_class_gets_another_forward_is_called_as_such():
    def inside(self, x):
        return self.bn(x)

    outputs = []
    for converted in (False, True):
        model = net(lambda self, x: self.relu(self.body(x) + x), body=net(inside)).eval()
        model = tribn.convert(model) if converted else model
        model(X)
        type(model.body).forward = lambda self, x: self.bn(x) * 2
        outputs.append(model(X))
    torch.testing.assert_close(*outputs)


def test_nothing_in_the_place_of_a_module_is_an_error_as_before():
    model = tribn.convert(nn.Sequential(*conv_bn(), nn.ReLU()))
    model[2] = None
    with pytest.raises(TypeError, match="NoneType"):
        model(X)


def test_another_tracer_sees_the_forward_that_was_written():
    model = tribn.convert(resnet()).eval()
    traced = torch.fx.symbolic_trace(model)
    names = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert names[:4] == ["conv1", "bn1", "relu", "maxpool"]
    torch.testing.assert_close(traced(IMAGES), model(IMAGES))


def test_unpacked_values_are_as_many_as_they_are_taken_for():
    def forward(self, pair):
        x, y = pair
        return self.relu(self.bn(x) + y)

    model, into = convert(net(forward).eval())
    assert into == {"bn": "residual, relu"}
    expected = net(forward).eval()(iter([X, X]))
    torch.testing.assert_close(model(iter([X, X])), expected)
    with pytest.raises(ValueError, match="3 values are unpacked: there must be 2"):
        model((X, X, X))


class Between(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.bn, self.last = nn.BatchNorm2d(3), last

    def forward(self, x):
        return self.last(self.bn(x))


@pytest.mark.parametrize(
    ("last", "passes"), [(nn.Hardtanh(), True), (nn.Dropout(), True), (nn.RReLU(), False)]
)
def test_a_call_waits_for_modules_whose_forward_is_known(last, passes):
    def forward(self, x):
        z = self.bn(self.conv(x))
        return self.relu(self.between(x) + z)

    _, into = convert(net(forward, between=Between(last)))
    assert into == ({"bn": "residual, relu"} if passes else {})


def test_forward_follows_the_mode(calls):
    def forward(self, x):
        z = self.bn(self.conv(x))
        z = F.relu(z) if self.training else torch.tanh(z)
        return F.dropout(z, 0.5, self.training)

    check(net(forward), {"bn": "relu; tanh"})
    assert {name for name, _ in calls} == {"relu", "tanh"}


def test_one_mode_may_be_fused_alone(calls):
    def forward(self, x):
        z = self.bn(self.conv(x))
        return F.relu(z) if self.training else z.abs()

    check(net(forward), {"bn": "relu"})
    assert {name for name, _ in calls} == {"relu", None}


def test_part_of_a_sequential_and_a_longer_one_are_what_they_say(calls):
    model = tribn.convert(nn.Sequential(*conv_bn(), nn.ReLU(), nn.Conv2d(3, 3, 1))).eval()
    torch.testing.assert_close(model[:2](X), model[1](model[0](X)))
    torch.testing.assert_close(model[1:](X), model[3](F.relu(model[1](X))))
    model.append(nn.Tanh())
    torch.testing.assert_close(model(X), torch.tanh(model[3](F.relu(model[1](model[0](X))))))
    assert ("relu", False) not in calls
    del model[4]
    model(X)
    assert calls[-1] == ("relu", False)


# Calls


def test_arguments_with_defaults_and_keywords(calls):
    def forward(self, x, scale=1, y=None, *, shift=None):
        z = self.bn(self.conv(x))
        if y is not None:
            z = z + y
        z = self.relu(z) * scale
        return z if shift is None else z + shift

    model, into = convert(net(forward).eval())
    assert into == {"bn": "relu; residual, relu"}
    z = model.bn(model.conv(X))
    fused, added, plain = ("relu", False), ("relu", True), (None, False)
    for args, options, y, call in (
        ((X,), {}, F.relu(z), fused),
        ((), {"x": X}, F.relu(z), fused),
        ((X,), {"y": None}, F.relu(z), fused),
        ((X,), {"y": X}, F.relu(z + X), added),
        ((), {"y": X, "x": X}, F.relu(z + X), added),
        ((X, 1, None), {}, F.relu(z), plain),
        ((X, 2, X), {}, F.relu(z + X) * 2, plain),
        ((X,), {"scale": 3}, F.relu(z) * 3, plain),
        ((X,), {"shift": 1}, F.relu(z) + 1, plain),
    ):
        del calls[:]
        torch.testing.assert_close(model(*args, **options), y)
        assert calls == [call], (args, options)
    for args, options in (((), {}), ((X,), {"wrong": 1}), ((X,), {"x": X}), ((X, 1, X, 1), {})):
        with pytest.raises(TypeError, match="argument"):
            model(*args, **options)
    with pytest.raises(TypeError, match="unsupported operand"):
        model(X, scale=None)


def test_parameters_and_buffers_are_read_when_forward_runs(calls):
    model = net(lambda self, x: self.relu(self.bn(x) + self.shift) * self.scale)
    model.shift = nn.Parameter(X.clone())
    model.register_buffer("scale", torch.ones(()))
    check(model, {"bn": "residual, relu"})
    assert set(calls) == {("relu", True)}
    model = tribn.convert(model).eval()
    y = model(X)
    model.scale.mul_(2)
    torch.testing.assert_close(model(X), y * 2)


def test_an_argument_whose_type_is_asked_for_is_a_list(calls):
    def forward(self, x):
        x = torch.cat([x] if isinstance(x, torch.Tensor) else x, 1)
        return self.relu(self.bn(self.conv(x)))

    model, into = convert(net(forward).eval())
    assert into == {"bn": "relu"}
    y = model([X[:, :1], X[:, 1:]])
    torch.testing.assert_close(model(X), y)
    torch.testing.assert_close(model((X[:, :1], X[:, 1:])), y)
    assert calls == [("relu", False), (None, False), (None, False)]


def test_an_argument_that_is_none(calls):
    def forward(self, x, y):
        z = self.bn(self.conv(x))
        return self.relu(z if y is None else z + y)

    model, into = convert(net(forward).eval())
    assert into == {"bn": "residual, relu"}
    torch.testing.assert_close(model(X, None), F.relu(model.bn(model.conv(X))))
    torch.testing.assert_close(model(X, X), F.relu(model.bn(model.conv(X)) + X))
    assert calls[::2] == [(None, False), ("relu", True)]


@pytest.mark.parametrize("wrap", [lambda y: {"y": y}, lambda y: [y, (y,)], lambda y: (y, None)])
def test_what_forward_returns_is_what_it_returned(wrap):
    model = net(lambda self, x: wrap(self.relu(self.bn(self.conv(x))))).eval()
    expected = model(X)
    model, into = convert(model)
    assert into == {"bn": "relu"}
    y = model(X)
    assert type(y) is type(expected)
    torch.testing.assert_close(y, expected)


class Sealed(type(nn.Module)):
    """A metaclass whose classes have no subclasses."""

    def __new__(mcs, name, bases, names):
        if any(isinstance(base, mcs) for base in bases):
            raise TypeError("sealed")
        return super().__new__(mcs, name, bases, names)


class Final(nn.Module, metaclass=Sealed):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(x))


class Reduces(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.bn(x))

    def __reduce__(self):
        return Reduces, ()


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def __call__(self, x):
        return F.relu(self.bn(x))


def with_forward():
    model = net(lambda self, x: F.relu(self.bn(x)))
    model.forward = lambda x: torch.tanh(model.bn(x))
    return model


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated
        return nn.Sequential(torch.jit.script(nn.Sequential(nn.ReLU())), nn.BatchNorm2d(3))


class Registers(type(nn.Module)):
    """A metaclass that takes no name twice."""

    def __new__(cls, name, bases, body):
        if any(isinstance(base, cls) for base in bases):
            raise ValueError(f"{name} is there")
        return super().__new__(cls, name, bases, body)


class Registered(nn.Module, metaclass=Registers):
    def __init__(self):
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(x))


KEPT = {
    "Registered.forward belongs to a class of the metaclass Registers": Registered,
    "Net.forward has an argument that is named device": lambda: net(
        lambda self, device: F.relu(self.bn(device))
    ),
    "Final.forward belongs to a class of the metaclass Sealed": Final,
    "Reduces.forward belongs to a class that pickles or copies itself": Reduces,
    "Calls.forward is not what is called": Calls,
    "Net.forward was replaced in this module": with_forward,
    "Sequential.forward returns it": scripted,
    "Net.forward takes *x": lambda: net(lambda self, *x: F.relu(self.bn(x[0]))),
    "Net.forward depends on the value or the shape of a tensor": lambda: net(
        lambda self, x: F.relu(self.bn(x)) if x.ndim == 4 else x
    ),
}


@pytest.mark.parametrize("reason", KEPT)
def test_modules_that_cannot_be_told_run_as_they_are(reason, calls, recwarn):
    model = KEPT[reason]().eval()
    expected, cls = model(X), type(model)
    assert why(model) == reason
    assert type(model) is cls
    torch.testing.assert_close(model(X), expected)
    assert calls == [(None, False)]
    assert not recwarn.list


def test_parts_of_a_module_that_cannot_be_told_are_fused(calls):
    def forward(self, *inputs, **options):
        y = self.part(inputs[0] if options["first"] else inputs[1])
        return {"y": y, "several": [y.item() if y.numel() == 1 else y]}

    model = net(forward, part=nn.Sequential(*conv_bn(), nn.ReLU())).eval()
    expected = model(X, "text", first=True)
    model, into = convert(model)
    assert into == {"part.1": "relu"}
    torch.testing.assert_close(model(X, "text", first=True), expected)
    assert calls == [("relu", False)]


# What converted modules are


def resnet():
    torch.manual_seed(0)
    return ResNet(8, 16)


IMAGES = torch.randn(8, 3, 33, 33, generator=torch.Generator().manual_seed(0))
FUSED = {
    "bn1": "relu",
    "layer1.0.bn1": "relu",
    "layer1.0.bn2": "residual, relu",
    "layer1.1.bn1": "relu",
    "layer1.1.bn2": "residual, relu",
    "layer2.0.bn1": "relu",
    "layer2.0.bn2": "residual, relu",
    "layer2.1.bn1": "relu",
    "layer2.1.bn2": "residual, relu",
}


def test_a_resnet(calls):
    check(resnet(), FUSED, IMAGES)
    assert set(calls) == {("relu", False), ("relu", True), (None, False)}


class NormAct(nn.Module):
    """What perf's networks call: a batch norm, and a residual and an activation that may be."""

    def __init__(self, norm, activation):
        super().__init__()
        self.norm = norm
        self.activation = activation and getattr(F, activation)

    def forward(self, x, residual=None):
        x = self.norm(x)
        if residual is not None:
            x = x + residual
        return x if self.activation is None else self.activation(x)


def of(axes):
    norm = getattr(nn, f"BatchNorm{axes}d")
    return lambda channels, activation: NormAct(norm(channels), activation)


def test_networks_that_people_train(calls):
    torch.manual_seed(0)
    images = nn.Sequential(
        networks.conv(3, 16, 3, 2),
        of(2)(16, "relu"),
        networks.Bottleneck(of(2), 16, 4, 1),
        networks.Bottleneck(of(2), 16, 8, 2),
        networks.InvertedResidual(of(2), 32, 32, 1, 2),
        networks.InvertedResidual(of(2), 32, 16, 2, 2),
    )
    _, into = convert(copy.deepcopy(images))
    assert Counter(into.values()) == {
        "relu; residual, relu": 7,  # with and without: one class serves both
        "relu6; residual, relu6": 4,
        "residual": 3,
    }
    check(images, into, IMAGES)
    assert {("relu", True), ("relu6", False), (None, True)} <= set(calls)
    volumes = networks.Level(of(3), 4, 4, 8)
    check(volumes, convert(copy.deepcopy(volumes))[1], torch.randn(2, 4, 8, 8, 8))
    rows = networks.mlp(of(1))
    check(rows, convert(copy.deepcopy(rows))[1], torch.randn(16, 128))


def test_modules_keep_their_classes_names_and_signatures():
    model, plain = tribn.convert(resnet()), resnet()
    for (name, module), theirs in zip(model.named_modules(), plain.modules(), strict=True):
        if not isinstance(module, nn.BatchNorm2d):
            assert isinstance(module, type(theirs)), name
        assert type(module).__name__ == type(theirs).__name__
        assert type(module).__qualname__ == type(theirs).__qualname__ or "BatchNorm" in repr(module)
    assert repr(model) == repr(plain)
    assert model.layer1[0].forward.__wrapped__ is Residual.forward


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_fused_and_independent(again, calls):
    model = tribn.convert(resnet()).eval()
    expected = model(IMAGES)
    copied = again(model)
    del calls[:]
    torch.testing.assert_close(copied(IMAGES), expected, rtol=0, atol=0)
    assert Counter(calls) == {("relu", False): 5, ("relu", True): 4, (None, False): 1}
    assert type(copied.layer1[0]) is type(model.layer1[0])
    copied.layer1[0].relu = nn.Tanh()
    assert not torch.equal(copied(IMAGES), expected)
    torch.testing.assert_close(model(IMAGES), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_compile_without_a_graph_break(training):
    model = tribn.convert(resnet()).train(training)
    model.layer2[0].bn1.eval()
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(2):
        torch.manual_seed(step)
        y = compiled(IMAGES)
        torch.manual_seed(step)
        expected = plain(IMAGES)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for (name, p), q in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_export():
    model = tribn.convert(resnet()).eval()
    program = torch.export.export(model, (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), model(IMAGES))


def test_the_code_is_shown_in_tracebacks():
    model = tribn.convert(nn.Sequential(*conv_bn(), nn.ReLU()))
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match="takes 4 axes") as error:
        model(torch.zeros(2, 3))
    (entry,) = (e for e in error.traceback if "tribn.fuse" in str(e.path))
    assert "call" in str(entry.statement)


def test_a_forward_of_its_own_is_called():
    """As libraries wrap modules by replacing what is called."""
    model = net(lambda self, x: self.relu(self.bn(self.conv(x))))
    model.relu.forward = lambda x: x * 3
    plain = copy.deepcopy(model)
    tribn.convert(model)
    torch.testing.assert_close(model(X), plain(X))


def test_what_reads_a_nameless_function_is_pickled_as_it_was():
    model = tribn.convert(PicklesALambda()).eval()
    assert tribn.convert(model, report=True)[1].rows[0].into == "relu"
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(X), model(X))


class PicklesALambda(nn.Module):
    helper = lambda self, z: z * 2  # noqa: E731  pickle finds no lambda by its name

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.helper(F.relu(self.bn(x)))


def test_a_forward_that_was_replaced_before_converting_again_is_fused():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.bn(x))

    model = tribn.convert(Again().eval())
    Again.forward = lambda self, x: F.silu(self.bn(x))
    model, into = convert(model)
    assert into == {"bn": "silu"}
    torch.testing.assert_close(model(X), F.silu(model.bn(X)))


def test_properties_are_read():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.factor = nn.BatchNorm2d(3), 2

        @property
        def scale(self):
            return self.factor + 1

        def forward(self, x):
            return F.relu(self.bn(x)) * self.scale

    model, into = convert(Scaled().eval())
    assert into == {"bn": "relu"}
    y = model(X)
    model.factor = 5
    torch.testing.assert_close(model(X), y * 2)


def test_profilers_and_tracers_go_on(calls):
    profiler, seen = cProfile.Profile(), []
    before = sys.gettrace()
    sys.settrace(lambda frame, *_: seen.append(frame.f_code.co_name))
    try:
        profiler.enable()
        tribn.convert(net(lambda self, x: self.relu(self.bn(x))))
        trained = called_after()
        profiler.disable()
    finally:
        sys.settrace(before)
    assert trained
    names = {name for _, _, name in pstats.Stats(profiler).stats}
    assert "called_after" in names
    assert "called_after" in seen


def called_after():
    return True


def test_threads_convert_models_of_their_own():
    with ThreadPoolExecutor(4) as pool:
        fused = list(pool.map(lambda _: convert(resnet())[1], range(4)))
    assert all(into == fused[0] != {} for into in fused)


# Dynamo itself makes an instance of every autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_input_as_residual_compiles():
    model, into = convert(net(lambda self, x: self.relu(self.bn(x) + x)))
    assert into == {"bn": "residual, relu"}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), copy.deepcopy(model)(X))
