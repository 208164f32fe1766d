"""Every provider gives a layer's results; a stand-in with the same API for what is not here."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from cases import of_no_kernel
from torch import nn
from torch.nn import functional as F

of_no_kernel()

from perf import providers
from perf.cases import LAYOUTS, OPS
from perf.gate import Case, Inputs, check
from perf.providers import PROVIDERS, Provider


def case(op, layout="channels-first"):
    return Case(replace(OPS[op], shape=(4, 5, 6, 7), count=1), layout, "fp32")


def assert_right(build, op, layout="channels-first"):
    of = case(op, layout)
    check(build(of.layer), of, Inputs.random(of, "cpu"))


def module(monkeypatch, name, **contents):
    """Puts a module of that name, and those it is in, where `import` finds them."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        monkeypatch.setitem(
            sys.modules, ".".join(parts[:length]), ModuleType(".".join(parts[:length]))
        )
    vars(sys.modules[name]).update(contents)


class Nhwc(nn.BatchNorm2d):
    """As apex.contrib.groupbn.BatchNorm2d_NHWC: of contiguous (N, H, W, C) tensors."""

    def __init__(self, num_features, fuse_relu=False):
        super().__init__(num_features)
        self.fuse_relu = fuse_relu

    def forward(self, x, z=None):
        assert x.is_contiguous()
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if z is not None:
            assert self.fuse_relu
            y = y + z
        return F.relu(y) if self.fuse_relu else y


@pytest.mark.parametrize("op", OPS)
def test_apex(op, monkeypatch):
    module(monkeypatch, "apex.contrib.groupbn", BatchNorm2d_NHWC=Nhwc)
    assert_right(PROVIDERS["apex"].build, op, "channels-last")


def test_flag_gems(monkeypatch):
    def batch_norm(
        input,
        weight=None,
        bias=None,
        running_mean=None,
        running_var=None,
        training=False,
        momentum=0.1,
        eps=1e-05,
    ):
        arguments = (input, weight, bias, running_mean, running_var, training, momentum, eps)
        return torch.native_batch_norm(*arguments)

    def batch_norm_backward(
        grad_out,
        input,
        weight=None,
        running_mean=None,
        running_var=None,
        save_mean=None,
        save_invstd=None,
        train=False,
        eps=1e-05,
        output_mask=None,
    ):
        arguments = (running_mean, running_var, save_mean, save_invstd, train, eps, output_mask)
        return torch.ops.aten.native_batch_norm_backward(grad_out, input, weight, *arguments)

    ops = {"batch_norm": batch_norm, "batch_norm_backward": batch_norm_backward}
    module(monkeypatch, "flag_gems.ops", **ops)
    assert_right(PROVIDERS["flag_gems"].build, "bn_add_relu")


def test_attorch(monkeypatch):
    class BatchNormAutoGrad:
        @staticmethod
        def apply(input, training, weight=None, bias=None, running_mean=None, running_var=None):
            return F.batch_norm(input, running_mean, running_var, weight, bias, training)

    module(monkeypatch, "attorch.batch_norm_layer", BatchNormAutoGrad=BatchNormAutoGrad)
    assert_right(PROVIDERS["attorch"].build, "bn_silu")


@pytest.mark.parametrize("name", ["apex", "flag_gems", "attorch"])
def test_what_is_not_here_says_so(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert PROVIDERS[name].obstacle("cpu") == "needs a CUDA device"
    assert f"{PROVIDERS[name].module} cannot be imported" in PROVIDERS[name].obstacle("cuda")
    module(monkeypatch, PROVIDERS[name].module)
    assert PROVIDERS[name].obstacle("cuda") is None


def test_what_is_here_has_no_obstacle():
    for name in ("tribn", "eager", "compile", "max-autotune", "cooperative"):
        assert PROVIDERS[name].obstacle("cpu") is PROVIDERS[name].obstacle("cuda") is None


def test_compiled_for_every_layer_anew():
    """By the compiler up to its code generator, which takes too long for a test on a CPU."""
    build = providers._compiled(backend="aot_eager")
    assert_right(build, "bn_add_relu")
    functions = [build(case("bn_relu").layer) for _ in range(2)]
    codes = {id(function._torchdynamo_orig_callable.__code__) for function in functions}
    assert len(codes) == 2, "what is compiled for one is searched by the other"
    for layout in LAYOUTS:
        of = case("bn_relu", layout)
        calls = Inputs.random(of, "cpu").calls(functions[0])
        for name in ("backward", "both", "backward", "eval"):
            calls[name]()


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of the compiler, on how to use this GPU
@pytest.mark.parametrize("name", ["tribn", "eager", "cooperative"])
def test_on_a_gpu(name):
    for layout in LAYOUTS:
        of = replace(case("bn_add_relu", layout), dtype="bf16")
        check(PROVIDERS[name].build(of.layer), of, Inputs.random(of, "cuda"))


def test_a_provider_is_one_line():
    assert_right(Provider(lambda layer: providers.unfused(F.batch_norm, layer)).build, "bn_relu6")
