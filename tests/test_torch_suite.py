"""PyTorch's tables of BatchNorm modules, errors and operator samples, with tribn in torch's place.

The tables are in the wheel, in `torch.testing._internal`; the tests that read them are not, so what
test_modules.py, test_ops.py, test_ops_gradients.py and the batch norm part of test_nn.py check is
checked here. Left out: forward-mode differentiation, `out=` and TorchScript.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, INTERPRET, SLOW
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close, make_tensor

import tribn
from tribn.functional import batch_norm


def _import_tables() -> tuple[Any, ...]:
    """torch's tables, without what importing them does to the rest of the process."""
    # Only the test classes of torch's utilities need expecttest, and nothing here uses those.
    expecttest = types.ModuleType("expecttest")
    expecttest.TestCase = unittest.TestCase
    sys.modules.setdefault("expecttest", expecttest)
    profile = hypothesis.settings.get_current_profile_name()
    with unittest.mock.patch.object(torch.backends, "disable_global_flags"):
        from torch.testing._internal import common_dtype, common_methods_invocations, common_modules
        from torch.testing._internal.common_utils import noncontiguous_like
    hypothesis.settings.load_profile(profile)
    dtypes = common_dtype.all_types_and_complex_and(torch.bool, F16, BF16)
    return common_modules.module_db, common_methods_invocations.op_db, dtypes, noncontiguous_like


MODULE_DB, OP_DB, ALL_DTYPES, noncontiguous_like = _import_tables()

# A kernel sees much the same of each, and one does for the slow interpreter.
NAMES = ["BatchNorm2d"] if INTERPRET else ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
INFOS = {
    name: next(info for info in MODULE_DB if info.module_cls is getattr(torch.nn, name))
    for name in NAMES
}
OP = next(op for op in OP_DB if (op.name, op.variant_test_name) == ("nn.functional.batch_norm", ""))


def module_inputs(
    name: str,
    device: str = "cpu",
    dtype: torch.dtype = F32,
    requires_grad: bool = False,
    training: bool = True,
) -> dict[str, Any]:
    info = INFOS[name]
    entries = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
    )
    named = {entry.desc or "default": entry for entry in entries}
    assert len(named) == len(entries) > 0
    return named


def module_errors(name: str, device: str = "cpu") -> list[Any]:
    info = INFOS[name]
    return info.module_error_inputs_func(
        info, device=device, dtype=F32, requires_grad=False, training=True
    )


def samples(device: str = "cpu", dtype: torch.dtype = F32) -> list[Any]:
    """torch's samples, less the tensors of one axis, which it accepts only when they are empty."""
    torch.manual_seed(0)
    every = OP.sample_inputs(device, dtype, requires_grad=True)
    return [sample for sample in every if sample.input.dim() > 1]


def sample_id(index: int) -> str:
    sample = samples()[index]
    mode = "train" if sample.kwargs.get("training") else "eval"
    return f"{index}-{'x'.join(map(str, sample.input.shape))}-{mode}"


CASES = [(name, desc) for name in NAMES for desc in module_inputs(name)]
IMAGES = [case for case in CASES if case[0] != "BatchNorm1d"]
ERRORS = [(name, index) for name in NAMES for index in range(len(module_errors(name)))]
SAMPLES = range(len(samples()))
# of the input, and of parameters and statistics
DTYPE_PAIRS = [*((dtype, dtype) for dtype in DTYPES), (F16, F32), (BF16, F32)]

cases = pytest.mark.parametrize("case", CASES, ids="-".join)
images = pytest.mark.parametrize("case", IMAGES, ids="-".join)
all_samples = pytest.mark.parametrize("index", SAMPLES, ids=sample_id)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# those of torch's own tests, of which one does for the slow interpreter
torch_dtypes = pytest.mark.parametrize("dtype", [F32] if INTERPRET else [F32, F64], ids=str)
dtype_pairs = pytest.mark.parametrize(("dtype", "param_dtype"), DTYPE_PAIRS, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@modes
def test_one_axis_is_refused_even_when_empty(training, device):
    with pytest.raises(ValueError, match=r"input has shape \(0,\)"):
        batch_norm(*(torch.empty(0, device=device) for _ in range(3)), training=training)


def test_tables_hold_batch_norm():
    assert {name for name, _ in CASES} == {name for name, _ in ERRORS} == set(NAMES)
    assert {sample.kwargs.get("training", False) for sample in samples()} == {True, False}


# test_modules.py


def pair(case: tuple[str, str], lazy: str = "", **options: Any) -> list[torch.nn.Module]:
    """torch's layer of a table entry and tribn's."""
    name, desc = case
    constructor = module_inputs(name)[desc].constructor_input
    args = constructor.args[1:] if lazy else constructor.args
    return [
        getattr(package, lazy + name)(*args, **{**constructor.kwargs, **options})
        for package in (torch.nn, tribn)
    ]


def table_input(case: tuple[str, str], *options: Any) -> Tensor:
    (x,) = module_inputs(case[0], *options)[case[1]].forward_input.args
    return x


def randomize(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Gives both layers the same parameters and statistics."""
    for tensor in theirs.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())


def build(
    case: tuple[str, str],
    device: str,
    dtype: torch.dtype = F32,
    training: bool = True,
    requires_grad: bool = True,
) -> tuple[torch.nn.Module, torch.nn.Module, Tensor]:
    """torch's layer of a table entry, tribn's with the same random state, and their input."""
    theirs, ours = (m.train(training) for m in pair(case, device=device, dtype=dtype))
    randomize(theirs, ours)
    return theirs, ours, table_input(case, device, dtype, requires_grad, training)


def run(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients, and buffers afterwards."""
    leaves = {"x": x, **dict(layer.named_parameters())}
    y = layer(x)
    grads = torch.autograd.grad(y, tuple(leaves.values()), dy)
    results = {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}
    results |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    if not x.numel():  # torch counts an empty batch; tribn leaves all statistics alone, and says so
        results.pop("num_batches_tracked", None)
    return results


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def metadata(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()


def assert_exact(actual: Any, exact: Any, expected: Any) -> None:
    """Compares with torch in float64: torch's tolerance, or twice what torch itself loses."""
    assert actual.keys() == expected.keys()
    for name, theirs in expected.items():
        losses = [(t - exact[name]).abs().max() for t in (actual[name], theirs) if t.numel()]
        assert actual[name].dtype == theirs.dtype, name
        if not losses or not losses[0] <= 2 * losses[1]:
            assert_close(actual[name], exact[name].to(theirs.dtype))


@cases
@modes
@all_dtypes
def test_module(case, training, dtype, device):
    theirs, ours, x = build(case, device, dtype, training)
    dy = torch.randn_like(x)
    exact = run(copy.deepcopy(theirs).double(), leaf(x.double()), dy.double())
    assert_exact(run(ours, x, dy), exact, run(theirs, x, dy))


@cases
@modes
def test_module_converts(case, training, device):
    _, layer, x = build(case, device, F32, training)
    for dtype in (F64, F16, BF16, F32):
        assert layer.to(dtype)(x.to(dtype)).dtype == dtype
        assert {t.dtype for t in layer.state_dict().values()} <= {dtype, torch.int64}


@cases
@all_dtypes
@pytest.mark.parametrize("lazy", ["", "Lazy"])
def test_module_factory_arguments(case, dtype, lazy, device):
    theirs, ours = pair(case, lazy, device=device, dtype=dtype)
    for first in (True, False):
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for tensor in (*ours.parameters(), *ours.buffers()):
            assert tensor.device.type == device
            assert tensor.dtype in (dtype, torch.int64)
        if first and lazy:
            x = table_input(case, device, dtype)
            assert metadata(ours(x)) == metadata(theirs(x))
    assert type(ours) is getattr(tribn, case[0])


@cases
@modes
def test_module_lazy(case, training, device):
    theirs, ours = (m.train(training) for m in pair(case, "Lazy", device=device))
    ours = pickle.loads(pickle.dumps(ours)).to(device)  # torch does not keep where there is nothing
    x = table_input(case, device, F32, True, training)
    for layer in (theirs, ours):
        with torch.no_grad():
            layer(x)
    dy = torch.randn_like(x)
    assert_close(run(ours, x, dy), run(theirs, x, dy))


@cases
@modes
def test_module_copies(case, training, device):
    theirs, layer, x = build(case, device, F32, training, requires_grad=False)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    clones = [
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
    ]
    theirs.load_state_dict(layer.state_dict())
    assert_close(theirs.state_dict(), layer.state_dict(), rtol=0, atol=0)
    y = layer(x)
    for clone in clones:
        assert type(clone) is type(layer)
        assert repr(clone) == repr(layer)
        assert_close(clone(x), y, rtol=0, atol=0)
        assert_close(clone.state_dict(), layer.state_dict(), rtol=0, atol=0)


@cases
@modes
@torch_dtypes
def test_module_noncontiguous(case, training, dtype, device):
    _, layer, x = build(case, device, dtype, training)
    dy = torch.randn_like(x)
    expected = run(copy.deepcopy(layer), x, dy)
    for strided_x in (x, leaf(noncontiguous_like(x.detach()))):
        for strided_dy in (dy, noncontiguous_like(dy)):
            assert_close(run(copy.deepcopy(layer), strided_x, strided_dy), expected)


@cases
@modes
def test_module_leaves_its_arguments_alone(case, training, device):
    _, layer, x = build(case, device, F32, training)
    dy = torch.randn_like(x)
    tensors = [x, dy, *layer.parameters()]
    before = [(t._version, t.detach().clone()) for t in tensors]
    run(layer, x, dy)
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, value)


@cases
@modes
def test_module_output_changed_in_place(case, training, device):
    theirs, ours, x = build(case, device, F64, training)
    dy = torch.randn_like(x)
    for layer in (theirs, ours):
        layer.register_forward_hook(lambda module, args, y: y.mul_(2).relu_())
    assert_close(run(ours, x, dy), run(theirs, x, dy))


@pytest.mark.parametrize("case", [c for c in CASES if table_input(c).numel()], ids="-".join)
def test_module_input_changed_in_place(case, device):
    theirs, ours, x = build(case, device)
    for layer in (theirs, ours):
        x = x.detach().clone()
        y = layer(x.requires_grad_())
        with torch.no_grad():
            x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.randn_like(y))


@images
@modes
def test_module_memory_format(case, training, device):
    _, layer, x = build(case, device, F32, training)
    contiguous = torch.contiguous_format
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    dy = torch.randn_like(x)
    expected = run(copy.deepcopy(layer), x, dy)
    for layer_format, x_format, dy_format in [
        *itertools.product([torch.preserve_format], [contiguous, last], [contiguous, last]),
        *itertools.product([contiguous, last], [last], [last]),
    ]:
        moved = copy.deepcopy(layer).to(memory_format=layer_format)
        formatted = leaf(x.detach().contiguous(memory_format=x_format))
        actual = run(moved, formatted, dy.contiguous(memory_format=dy_format))
        assert actual["y"].is_contiguous(memory_format=x_format)
        assert actual["dx"].is_contiguous(memory_format=x_format)
        assert_close(actual, expected)


def _check_module(check: Callable[..., bool], case: Any, training: bool, device: str) -> None:
    _, layer, x = build(case, device, F64, training)
    leaves = {"x": x, **dict(layer.named_parameters())}

    def function(*tensors: Tensor) -> Tensor:
        x, *parameters = tensors
        named = dict(zip(list(leaves)[1:], parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    subsets = [set(leaves)]
    if not INTERPRET:
        subsets += [{"x", name} for name in leaves] + [{name} for name in leaves]
    for wanted in subsets:
        tensors = [t.detach().requires_grad_(name in wanted) for name, t in leaves.items()]
        assert check(function, tensors, fast_mode=True)


@cases
@modes
def test_module_gradcheck(case, training, device):
    _check_module(gradcheck, case, training, device)


@pytest.mark.skipif(
    INTERPRET,
    reason="second derivatives are plain PyTorch: they are tested outside the interpreter",
)
@cases
@modes
def test_module_gradgradcheck(case, training, device):
    _check_module(gradgradcheck, case, training, device)


@cases
def test_module_modes_differ(case, device):
    theirs, ours, x = build(case, device, requires_grad=False)
    assert INFOS[case[0]].train_and_eval_differ
    differ = [
        not torch.equal(copy.deepcopy(layer).train()(x), copy.deepcopy(layer).eval()(x))
        for layer in (theirs, ours)
    ]
    assert differ[0] == differ[1]
    del ours.training
    with pytest.raises(AttributeError, match="training"):
        ours(x)


@cases
@modes
def test_module_on_meta(case, training, device):
    _, layer, x = build(case, device, F32, training)
    with torch.device("meta"):
        _, meta = pair(case)
    meta_x = leaf(x.to("meta"))
    meta_dy = torch.empty_like(meta_x)
    actual = {**meta.state_dict(), **run(meta.train(training), meta_x, meta_dy)}
    real = copy.deepcopy(layer)
    expected = {**real.state_dict(), **run(real, x, torch.randn_like(x))}
    assert {t.device.type for t in actual.values()} == {"meta"}
    assert {n: metadata(t) for n, t in actual.items()} == {
        n: metadata(t) for n, t in expected.items()
    }
    filled = meta.to_empty(device=device)
    filled.load_state_dict(layer.state_dict())
    assert_close(filled(x), layer(x), rtol=0, atol=0)


@pytest.mark.gpu
@cases
@modes
@torch_dtypes
def test_module_same_on_both_devices(case, training, dtype):
    _, layer, x = build(case, "cpu", dtype, training)
    dy = torch.randn_like(x)
    on_gpu = run(copy.deepcopy(layer).cuda(), leaf(x.cuda()), dy.cuda())
    assert_close(on_gpu, run(layer, x, dy), check_device=False)


@pytest.mark.gpu
@cases
@modes
def test_module_moves_between_devices(case, training):
    _, layer, x = build(case, "cpu", F32, training)
    for device in ("cuda", "cpu", "cuda"):
        assert layer.to(device)(x.to(device)).device.type == device
        assert {t.device.type for t in layer.state_dict().values()} <= {device}


@pytest.mark.parametrize(("name", "index"), ERRORS)
def test_module_errors(name, index, device):
    error = module_errors(name, device)[index]
    constructor = error.module_error_input.constructor_input
    forward = error.module_error_input.forward_input
    with pytest.raises(error.error_type, match=error.error_regex):
        getattr(torch.nn, name)(*constructor.args, **constructor.kwargs).to(device)(*forward.args)
    with pytest.raises((ValueError, TypeError), match="must be positive"):
        getattr(tribn, name)(*constructor.args, **constructor.kwargs).to(device)(*forward.args)


# test_ops.py and test_ops_gradients.py


def call(
    function: Callable[..., Tensor],
    sample: Any,
    dtype: torch.dtype | None = None,
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """Output, gradients, and running statistics afterwards, on a copy of the sample."""

    def copied(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        strided = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=tensor.device
        )
        return strided.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    names = ("x", "running_mean", "running_var", "weight", "bias")
    tensors = {n: copied(t) for n, t in zip(names, (sample.input, *sample.args), strict=True)}
    leaves = {n: t for n, t in tensors.items() if t is not None and t.requires_grad}
    arguments = tensors | {name: view(tensor) for name, tensor in leaves.items()}
    y = function(*arguments.values(), **sample.kwargs)
    torch.manual_seed(1)
    dy = torch.randn(y.shape).to(sample.input.dtype).to(y)
    grads = torch.autograd.grad(y, tuple(leaves.values()), view(dy))
    results = {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}
    return results | {n: t for n, t in tensors.items() if n in names[1:3] and t is not None}


@all_samples
@all_dtypes
def test_operator(index, dtype, device):
    sample = samples(device, dtype)[index]
    exact, expected = call(F.batch_norm, sample, F64), call(F.batch_norm, sample)
    assert_exact(call(batch_norm, sample), exact, expected)


@all_samples
@torch_dtypes
def test_operator_noncontiguous(index, dtype, device):
    sample = samples(device, dtype)[index]
    exact, expected = call(F.batch_norm, sample, F64), call(F.batch_norm, sample)
    assert_exact(call(batch_norm, sample.noncontiguous()), exact, expected)


@all_samples
def test_operator_negative_views(index, device):
    """Tensors that negate lazily, as ``z.conj().imag`` does."""
    sample = samples(device, F64)[index]
    actual = call(batch_norm, sample, view=lambda tensor: torch._neg_view(tensor.neg()))
    assert_close(actual, call(F.batch_norm, sample))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_operator_dtypes(dtype, device):
    x = make_tensor((4, 3), dtype=dtype, device=device)
    statistics = [make_tensor((3,), dtype=dtype, device=device, low=0) for _ in range(2)]
    if dtype in OP.supported_dtypes(device):
        assert batch_norm(x, *statistics, training=True).dtype == dtype
    else:
        with pytest.raises(TypeError, match=str(dtype)):
            batch_norm(x, *statistics, training=True)


def _check_operator(check: Callable[..., bool], index: int, device: str, **options: Any) -> None:
    sample = samples(device, F64)[index]
    tensors = [sample.input, *sample.args]
    wanted = [i for i, t in enumerate(tensors) if t is not None and t.requires_grad]

    def function(*changed: Tensor) -> Tensor:
        arguments = dict(enumerate(tensors)) | dict(zip(wanted, changed, strict=True))
        return batch_norm(*arguments.values(), **sample.kwargs)

    leaves = [tensors[i] for i in wanted]
    tolerance = OP.gradcheck_nondet_tol
    assert check(function, leaves, nondet_tol=tolerance, fast_mode=True, **options)


@all_samples
def test_operator_gradcheck(index, device):
    _check_operator(gradcheck, index, device, check_batched_grad=OP.check_batched_grad)


@all_samples
@pytest.mark.parametrize("strided", [False, True])
def test_operator_gradgradcheck(index, strided, device):
    options = {
        "gen_non_contig_grad_outputs": strided,
        "check_batched_grad": OP.check_batched_gradgrad,
    }
    _check_operator(gradgradcheck, index, device, **options)


@all_samples
@torch_dtypes
def test_operator_on_fake_tensors(index, dtype, device):
    sample = samples(device, dtype)[index]
    expected = call(batch_norm, sample)
    with FakeTensorMode() as mode:
        fake = sample.transform(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t)
        actual = call(batch_norm, fake)
    for name, tensor in actual.items():
        assert metadata(tensor) == metadata(expected[name])
        assert tensor.device == expected[name].device


@pytest.mark.gpu
@all_samples
@torch_dtypes
def test_operator_same_on_both_devices(index, dtype):
    sample = samples("cpu", dtype)[index]

    def moved(value):
        needed = isinstance(value, Tensor) and value.requires_grad
        return value.cuda().requires_grad_(needed) if isinstance(value, Tensor) else value

    on_gpu = sample.transform(moved)
    assert_close(call(batch_norm, on_gpu), call(batch_norm, sample), check_device=False)


# The batch norm tests of test_nn.py


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("size", [9, 11])
@modes
def test_wrong_size(name, size, training, device):
    x, mean, var, wrong = (torch.rand(s, device=device) for s in ((2, 10), 10, 10, size))
    arguments = {"running_mean": mean, "running_var": var, "training": training, name: wrong}
    with pytest.raises(RuntimeError, match=name):
        F.batch_norm(x, **arguments)
    with pytest.raises(ValueError, match=name):
        batch_norm(x, **arguments)


@pytest.mark.parametrize("shape", [(1, 10), (1, 10, 1)])
def test_one_value_per_channel(shape, device):
    x = torch.rand(shape, device=device)
    for package in (torch.nn, tribn):
        with pytest.raises(ValueError, match="per channel"):
            package.BatchNorm1d(10, device=device)(x)


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
def test_evaluation_needs_statistics(missing, device):
    statistics = [None if i in missing else torch.rand(3, device=device) for i in range(2)]
    x = torch.rand(2, 3, device=device)
    with pytest.raises(RuntimeError, match="running_"):
        F.batch_norm(x, *statistics)
    with pytest.raises(ValueError, match="running_"):
        batch_norm(x, *statistics)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lazy", ["", "Lazy"])
@pytest.mark.parametrize("rank", range(1, 7))
@modes
def test_wrong_rank(name, lazy, rank, training, device):
    x = torch.rand((2,) * rank, device=device)
    raised = []
    for package in (torch.nn, tribn):
        layer = getattr(package, lazy + name)(*(() if lazy else (2,)), device=device)
        try:
            layer.train(training)(x)
        except (ValueError, IndexError):
            raised.append(package)
    assert raised in ([], [torch.nn, tribn])


@pytest.mark.parametrize("name", NAMES)
@modes
def test_wrong_number_of_channels(name, training, device):
    x = torch.rand((2, 3, 4, 4, 4)[: int(name[-2]) + 2], device=device)
    theirs, ours = (
        getattr(package, name)(2, device=device).train(training) for package in (torch.nn, tribn)
    )
    with pytest.raises(RuntimeError, match="running_mean"):
        theirs(x)
    with pytest.raises(ValueError, match="3 channels"):
        ours(x)


@modes
def test_statistics_not_tracked(training, device):
    x = torch.rand(32, 4, device=device)
    outputs = []
    for package in (torch.nn, tribn):
        layer = package.BatchNorm1d(4, device=device).train(training)
        layer.track_running_stats = False
        before = copy.deepcopy(layer.state_dict())
        outputs.append(layer(x))
        assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert_close(outputs[1], outputs[0])


@dtype_pairs
def test_simple_average(dtype, param_dtype, device):
    layer = tribn.BatchNorm1d(3, momentum=None, device=device, dtype=param_dtype)
    initial = copy.deepcopy(layer.state_dict())
    batches = torch.rand(2, 4, 3, dtype=dtype, device=device)
    seen = []
    for subset in (batches[:1], batches[1:], batches):
        layer.reset_running_stats()
        assert_close(layer.state_dict(), initial, rtol=0, atol=0)
        for batch in subset:
            layer(batch)
        assert layer.num_batches_tracked == len(subset)
        seen.append(torch.stack([layer.running_mean, layer.running_var]))
    assert not torch.equal(seen[0], seen[1])
    assert_close(seen[2], (seen[0] + seen[1]) / 2)


@dtype_pairs
def test_statistics_updated_in_training_alone(dtype, param_dtype, device):
    layer = tribn.BatchNorm1d(3, momentum=0.3, device=device, dtype=param_dtype)
    x = torch.rand(4, 3, dtype=dtype, device=device)
    layer(x)
    var, mean = torch.var_mean(x.double(), 0)
    assert_close(layer.running_mean, (0.3 * mean).to(param_dtype))
    assert_close(layer.running_var, (0.7 + 0.3 * var).to(param_dtype))
    assert layer.num_batches_tracked == 1
    after = copy.deepcopy(layer.state_dict())
    layer.eval()(x)
    assert_close(layer.state_dict(), after, rtol=0, atol=0)


@dtype_pairs
def test_evaluation_repeats(dtype, param_dtype, device):
    layer = tribn.BatchNorm1d(3, device=device, dtype=param_dtype).eval()
    x = torch.rand(4, 3, dtype=dtype, device=device, requires_grad=True)
    dy = torch.rand_like(x)
    first = run(layer, x, dy)
    assert_close(run(layer, x, dy), first, rtol=0, atol=0)
    layer.track_running_stats = False
    assert_close(run(layer, x, dy), first, rtol=0, atol=0)


@dtype_pairs
def test_affine(dtype, param_dtype, device):
    plain = tribn.BatchNorm1d(3, affine=False, device=device, dtype=param_dtype)
    affine = tribn.BatchNorm1d(3, device=device, dtype=param_dtype)
    x = torch.rand(4, 3, 5, dtype=dtype, device=device, requires_grad=True)
    dy = torch.rand_like(x)
    expected, actual = run(plain, x, dy), run(affine, x, dy)
    assert_close({name: actual[name] for name in expected}, expected, rtol=0, atol=0)
    with torch.no_grad():
        affine.weight.fill_(2)
    actual = run(affine, x, dy)
    assert_close([actual["y"], actual["dx"]], [expected["y"] * 2, expected["dx"] * 2])


@modes
def test_empty_batch(training, device):
    layer = tribn.BatchNorm2d(3, device=device).train(training)
    state = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, 3, 2, 2, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    for parameter in layer.parameters():
        assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=0)
    assert_close(layer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "shape", [(4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1), (2, 8, 8, 1), (2, 4, 3, 5, 3)], ids=str
)
@dtype_pairs
@modes
def test_channels_last(shape, dtype, param_dtype, training, device):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    name = f"BatchNorm{len(shape) - 2}d"
    theirs, ours = (
        getattr(package, name)(shape[1], device=device, dtype=param_dtype).train(training)
        for package in (torch.nn, tribn)
    )
    randomize(theirs, ours)
    x, dy = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    formats = [dy.contiguous(memory_format=last), dy.transpose(1, 2).contiguous().transpose(1, 2)]
    x = leaf(x.contiguous(memory_format=last))
    exact = run(copy.deepcopy(theirs).double(), leaf(x.double()), dy.double())
    expected = run(theirs, x, formats[0])
    for formatted in formats:
        actual = run(copy.deepcopy(ours), x, formatted)
        assert actual["y"].is_contiguous(memory_format=last)
        assert actual["dx"].is_contiguous(memory_format=last)
        assert_exact(actual, exact, expected)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_channels_last_evaluates_to_the_same_bits(dtype, device):
    x = torch.randn(2, 64, 5, 5, dtype=dtype, device=device)
    layer = tribn.BatchNorm2d(64, device=device, dtype=dtype).eval()
    assert torch.equal(layer(x), layer(x.contiguous(memory_format=torch.channels_last)))


def test_permuted_input_keeps_its_memory_format(device):
    x = torch.arange(6.0, device=device).reshape(1, 3, 2, 1).permute(0, 2, 1, 3)
    theirs, ours = (package.BatchNorm2d(2, device=device).eval() for package in (torch.nn, tribn))
    theirs.weight.data.uniform_()
    ours.load_state_dict(theirs.state_dict())
    assert ours(x).is_contiguous(memory_format=torch.channels_last)
    assert_close(ours(x), theirs(x.contiguous()))


def test_half_and_float_parameters(device):
    x = torch.randint(1, 10, (2, 3, 2, 2), device=device).half().requires_grad_()
    dy = torch.ones_like(x)
    layer = tribn.BatchNorm2d(3, device=device)
    wide, narrow = run(layer, x, dy), run(layer.half(), x, dy)
    assert narrow["y"].dtype == wide["y"].dtype == F16
    assert_close(narrow["y"], wide["y"])
    assert_close(narrow["dx"], wide["dx"], rtol=0, atol=1e-3)


@modes
def test_half_input_without_parameters(training, device):
    x = torch.randn(16, 3, 24, 24, dtype=F16, device=device)
    layer = tribn.BatchNorm2d(3, affine=False, device=device).train(training)
    assert metadata(layer(x)) == metadata(x)
    assert layer.running_var.dtype == F32


@SLOW
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_batch(dtype, device):
    x = torch.rand(880801, 1, 1, 1, dtype=dtype, device=device, requires_grad=True)
    dy = torch.rand_like(x)
    theirs, ours = (package.BatchNorm2d(1, device=device) for package in (torch.nn, tribn))
    exact = run(copy.deepcopy(theirs).double(), leaf(x.double()), dy.double())
    assert_exact(run(ours, x, dy), exact, run(theirs, x, dy))


def test_state_dicts_without_a_counter(device):
    layer = tribn.BatchNorm2d(3, device=device)
    assert layer.num_batches_tracked == 0
    layer.num_batches_tracked.fill_(10)
    layer.load_state_dict({}, strict=False)
    assert layer.num_batches_tracked == 10
    with torch.device("meta"):
        meta = tribn.BatchNorm2d(3)
    meta.load_state_dict({}, assign=True, strict=False)
    assert_close(meta.state_dict()["num_batches_tracked"], torch.tensor(0))


@pytest.mark.parametrize(
    ("first", "name", "shape", "fuse"),
    [
        (torch.nn.Conv2d(3, 4, 2), "BatchNorm2d", (2, 3, 5, 5), fuse_conv_bn_eval),
        (torch.nn.Linear(3, 4), "BatchNorm1d", (6, 3), fuse_linear_bn_eval),
    ],
    ids=["conv", "linear"],
)
def test_fusion(first, name, shape, fuse, device):
    layer = getattr(tribn, name)(4, device=device)
    first = copy.deepcopy(first).to(device)
    x = torch.randn(shape, device=device)
    layer(first(x))
    layer.eval()
    first.eval()
    assert_close(fuse(first, layer)(x), layer(first(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_conversion_to_sync_batch_norm(name):
    layer = torch.nn.Sequential(getattr(tribn, name)(4, eps=1e-3, momentum=0.3))
    state = copy.deepcopy(layer.state_dict())
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert isinstance(converted[0], torch.nn.SyncBatchNorm)
    assert (converted[0].num_features, converted[0].eps, converted[0].momentum) == (4, 1e-3, 0.3)
    assert_close(converted.state_dict(), state, rtol=0, atol=0)
