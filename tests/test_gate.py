"""The gate before the clocks: right results pass, and each kind of wrong one is named."""

from dataclasses import replace

import pytest
import torch
from cases import of_no_kernel
from torch.nn import functional as F

of_no_kernel()

from perf.cases import DTYPES, LAYOUTS, OPS
from perf.gate import Case, Inputs, WrongResult, check, exact, results
from perf.providers import PROVIDERS, unfused


def case(op="bn_add_relu", layout="channels-first", dtype="fp32", shape=(4, 5, 6, 7)):
    return Case(replace(OPS[op], shape=shape, count=1), layout, dtype)


def inputs(case):
    torch.manual_seed(0)
    return Inputs.random(case, "cpu")


@pytest.mark.parametrize("provider", ["tribn", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_right_results_pass(op, dtype, provider):
    for layout in LAYOUTS:
        of = case(op, layout, dtype, shape=(16, 5, 10, 10))
        check(PROVIDERS[provider].build(of.layer), of, inputs(of))


class Scaled(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None


def eager(x, residual, running_mean, running_var, weight, bias, training, eps=1e-5):
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, eps=eps)
    return torch.relu(y + residual)


def wrong_output(*arguments):
    return eager(*arguments) * 1.001


def wrong_eps(*arguments):
    return eager(*arguments, eps=1e-2)


def wrong_eval(*arguments):
    return eager(*arguments[:-1], True)


def wrong_gradient(x, *arguments):
    return eager(Scaled.apply(x, 1.001), *arguments)


def wrong_gradient_of_weight(x, residual, mean, var, weight, bias, training):
    return eager(x, residual, mean, var, Scaled.apply(weight, 0.0), bias, training)


def wrong_gradient_of_residual(x, residual, *arguments):
    return eager(x, Scaled.apply(residual, -1.0), *arguments)


def no_running_mean(x, residual, mean, *arguments):
    return eager(x, residual, mean.clone(), *arguments)


def biased_running_var(x, residual, mean, var, *arguments):
    unbiased = var.clone()
    y = eager(x, residual, mean, unbiased, *arguments)
    if arguments[-1]:
        n = x.numel() // x.shape[1]
        var *= 0.9
        var += (unbiased - var) * (n - 1) / n
    return y


def wrong_momentum(x, residual, mean, var, *arguments):
    y = F.batch_norm(x, mean, var, *arguments, momentum=0.9)
    return torch.relu(y + residual)


def no_statistics(x, residual, mean, var, *arguments):
    return eager(x, residual, mean.clone(), var.clone(), *arguments)


def nan(*arguments):
    y = eager(*arguments)
    return torch.where(torch.arange(y.shape[-1]) > 5, torch.nan, y)


def other_dtype(*arguments):
    return eager(*arguments).double()


def cut(*arguments):
    return eager(*arguments)[:1]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (wrong_output, "output is off by 0.001"),
        (wrong_eps, "output"),
        (wrong_eval, "output of eval"),
        (wrong_gradient, "gradient of x is off by 0.001"),
        (wrong_gradient_of_weight, "gradient of weight is off by 1,"),
        (wrong_gradient_of_residual, "gradient of residual is off by 2,"),
        (no_running_mean, "running_mean"),
        (biased_running_var, "running_var"),
        (nan, "output of eval is off by nan|output is off by nan"),
        (other_dtype, "output is torch.float64"),
        (cut, "Mismatch in shape"),
    ],
)
def test_wrong_results_are_named(function, named):
    of = case()
    with pytest.raises((WrongResult, RuntimeError), match=named):
        check(function, of, inputs(of))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (wrong_eps, "output of eval"),
        (wrong_eval, "output of eval"),
        (wrong_momentum, "running_mean"),
        (no_statistics, "running_mean"),
        (no_running_mean, "running_mean"),
        (biased_running_var, "running_var"),
    ],
)
def test_so_are_wrong_statistics_of_half_precision(function, named, dtype):
    of = case(dtype=dtype)
    with pytest.raises(WrongResult, match=named):
        check(function, of, inputs(of))


def test_half_precision_is_allowed_its_roundings_and_no_more():
    for dtype, wrong in (("fp16", 1.005), ("bf16", 1.04)):
        of = case(dtype=dtype)
        check(eager, of, inputs(of))
        with pytest.raises(WrongResult, match="output"):
            check(lambda *a, wrong=wrong: eager(*a) * wrong, of, inputs(of))


def test_rounding_across_the_cut_off_is_no_error():
    """Values on the cut-off, that one side rounds up and the other down."""
    of = case("bn_relu")
    of_inputs = inputs(of)

    def rounds_up(x, residual, *arguments):
        z = F.batch_norm(x, *arguments)
        return torch.relu(z + 1e-6 * (z.detach().abs() < 1e-2))

    pre = F.batch_norm(of_inputs.x, None, None, of_inputs.weight, of_inputs.bias, True)
    with torch.no_grad():  # every value of a channel's first row is moved to the cut-off
        of_inputs.bias.sub_(pre[0, :, 0, 0])
    y = results(rounds_up, of_inputs)["output"]
    assert (y[0, :, 0, 0] > 0).all()
    check(rounds_up, of, of_inputs)


def test_all_zero_output_does_not_pass_for_cut_off():
    of = case("bn_relu")
    with pytest.raises(WrongResult, match="output is off by 1,"):
        check(lambda x, residual, *arguments: F.batch_norm(x, *arguments) * 0, of, inputs(of))


@pytest.mark.parametrize("op", OPS)
def test_exact_is_float64_autograd(op):
    """Of an output without rounding, the cut-off is that of float64 itself."""
    of = case(op)
    given = inputs(of)
    plain = results(unfused(F.batch_norm, of.layer), given.double())
    found = exact(of.layer, given, plain["output"])
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 5, 7), (6, 5, 3, 4), (6, 5, 2, 3, 4)], ids=str)
def test_layouts(shape):
    first, last = (inputs(case(layout=layout, shape=shape)) for layout in LAYOUTS)
    for name in ("x", "dy", "residual"):
        assert getattr(first, name).stride(-1) == 1
        assert getattr(last, name).stride(1) == 1
        assert getattr(last, name).shape == shape


def test_inputs_are_far_from_zero_and_parameters_in_float32():
    of = inputs(case(dtype="bf16", shape=(64, 5, 8, 8)))
    assert of.x.dtype == of.residual.dtype == of.dy.dtype == torch.bfloat16
    assert of.weight.dtype == of.bias.dtype == of.running[0].dtype == torch.float32
    assert of.x.float().mean().item() == pytest.approx(3, abs=0.1)
    assert of.x.float().std().item() == pytest.approx(2, abs=0.1)


def test_calls_can_be_repeated_in_any_order():
    of = case()
    given = inputs(of)
    calls = given.calls(PROVIDERS["eager"].build(of.layer))
    first = calls["backward"]()
    for name in ("forward", "eval", "both", "forward", "backward", "both"):
        calls[name]()
    for again, once in zip(calls["backward"](), first, strict=True):
        torch.testing.assert_close(again, once)
    assert [t.shape for t in first] == [t.shape for t in given.leaves.values()]
    assert calls["forward"]().requires_grad
    assert not calls["eval"]().requires_grad
