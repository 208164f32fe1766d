"""Every kernel at every kind of plan, compiled for devices that are not there."""

import re

import pytest
import torch
from cases import INTERPRET, PLAIN

if INTERPRET:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from perf.codegen import TARGETS, compiling, resources
from tribn import kernels
from tribn.reference import new_bits

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# shape, memory format, dtype: whether 16-byte accesses are possible
TENSORS = {
    "planes": ((128, 256, 56, 56), CONTIGUOUS, BF16, True),
    "planes of 14x14": ((128, 512, 14, 14), CONTIGUOUS, F32, True),
    "planes of 7x7": ((128, 512, 7, 7), CONTIGUOUS, BF16, False),
    "few channels": ((20, 6, 65536), CONTIGUOUS, F16, True),
    "one channel": ((3000, 1, 9), CONTIGUOUS, F32, True),
    "pixels": ((128, 256, 56, 56), CHANNELS_LAST, BF16, True),
    "narrow pixels": ((64, 24, 56, 56), CHANNELS_LAST, F32, True),
    "odd pixels": ((8, 65, 100, 100), CHANNELS_LAST, BF16, False),
    "rows": ((4096, 512), CONTIGUOUS, F64, True),
    "odd planes": ((64, 512, 7, 7), CONTIGUOUS, F64, False),
}


def tensor(shape, memory_format, dtype):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=memory_format) if len(shape) == 4 else x


def compile_all(target, x):
    """Every kernel that the operators launch on x, with everything optional there and not."""
    C = x.shape[1]
    f32, f64 = (torch.empty(C, dtype=dtype, device="meta") for dtype in (F32, F64))
    stat = f64 if x.dtype == F64 else f32
    half = torch.empty(C, dtype=BF16, device="meta")
    counter = torch.empty((), dtype=torch.int64, device="meta")

    def train(*args, momentum=0.1, act=PLAIN, residual=None, mask=None, bits=False):
        statistics = (*args[2:], momentum, 1, False)
        kernels.batch_norm_train(x, *args[:2], residual, mask, *statistics, 1e-5, 1, *act, bits)

    def evaluate(act=PLAIN, residual=None, bits=False):
        kernels.batch_norm_eval(x, stat, stat, f32, f32, residual, None, 1e-5, 1, *act, bits)

    def backward(x, weight, training, wanted, act=PLAIN, residual=None, bits=None, mask=None):
        count = None if mask is None else counter
        tensors = (dy, x, stat, stat, weight, weight, residual, bits, mask, count)
        dtype = dy.dtype
        kernels.batch_norm_backward(*tensors, 1e-5, training, 1, *act, dtype, dtype, wanted)

    dy, mask = x, x.select(1, 0).to(torch.bool)
    bits = new_bits(x, 1)
    every, none = [True, True, True, False], (None,) * 5
    with compiling(target) as compiled:
        kernels.batch_stats(x, None, 1)
        train(f32, f32, f32, f32, counter, momentum=None)
        train(half, None, half, half, counter)
        train(*none)
        evaluate()
        backward(x, f32, True, every)
        backward(x, f32, False, every)
        backward(None, f32, False, [True, False, True, False])
        backward(None, None, False, [True, False, False, False])
        # an activation, with a residual and a mask, behind the normalization and before it
        relu, gelu = ("relu", 0.0, 0.0, False), ("gelu_tanh", 0.0, 0.0, False)
        train(f32, f32, f32, f32, counter, act=relu, residual=x, bits=True)
        train(f32, f32, f32, f32, counter, act=gelu, mask=mask)
        train(f32, f32, f32, f32, counter, act=("gelu_tanh", 0.0, 0.0, True))
        evaluate(relu, x, True)
        evaluate(gelu)
        backward(x, f32, True, every, relu)
        backward(x, f32, True, [True] * 4, relu, bits=bits)
        backward(x, f32, True, every, gelu, residual=x, mask=mask)
        backward(x, f32, True, every, ("gelu_tanh", 0.0, 0.0, True))
        backward(None, f32, False, [True, False, False, True], relu, bits=bits)
    return compiled


TENSOR_KERNELS = {"stats", "normalize", "backward_reduce", "backward_dx"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TENSORS)
def test_registers_and_accesses(name, target):
    *description, aligned = TENSORS[name]
    x = tensor(*description)
    compiled = compile_all(target, x)
    seen = set()
    for kernel in compiled:
        found = resources(kernel)
        stage = found.name.removesuffix("_kernel")
        seen.add(stage)
        assert found.spills == 0, found
        assert found.registers <= 168, f"fewer than 12 warps fit a multiprocessor: {found}"
        if stage in TENSOR_KERNELS:
            if x.element_size() == 2:  # nothing else is accessed in two bytes, a half weight aside
                narrow = found.loads[2] + found.stores[2]
                assert narrow <= 64 // 8 if aligned else narrow > 0, found
            if aligned:
                assert found.loads[16] > 0, found
                assert found.stores[16] > 0 or stage in {"stats", "backward_reduce"}, found
    assert seen >= TENSOR_KERNELS


@pytest.mark.parametrize("name", TENSORS)
def test_addresses_are_64_bits_wide(name):
    """No tile of a tensor is addressed by 32-bit offsets, which 2^31 elements would overflow."""
    for kernel in compile_all("sm_90", tensor(*TENSORS[name][:3])):
        addresses = re.findall(r"tt\.addptr .* : .*", kernel.asm["ttir"])
        assert addresses, kernel.metadata.name
        for line in addresses:
            assert re.search(r"i64>?(?: loc\(.*\))?$", line), line
