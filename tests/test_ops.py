"""The operators against their schemas and fakes, and the bits that one hands on to another."""

import pytest
import torch
from cases import BF16, EPS, F16, F32, F64, LAYOUTS, PLAIN, strides

from tribn import ops, reference

RELU, SILU = ("relu", 0.0, 0.0, False), ("silu", 0.0, 0.0, False)
TANH_FIRST = ("tanh", 0.0, 0.0, True)
EVERY = [True, True, True, True]


def calls(shape):
    """Every operator, with arguments that have to do with what is fused."""
    torch.manual_seed(0)
    C = shape[1]
    x, residual, dy = torch.randn(3, *shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.6
    weight, bias, mean, var = torch.rand(4, C)
    states, absent = (mean.clone(), var.clone(), torch.tensor(3)), (None,) * 3
    bits = torch.randint(0, 256, reference.new_bits(x, 1).shape, dtype=torch.uint8)
    statistics, wider, count = (mean, var), (mean.double(), var.double()), torch.tensor(7)
    frozen, at = (None, mean, var, weight, bias), (EPS, 1)
    train = [
        (x, weight, bias, residual, mask, *states, 0.1, 1, True, *at, *RELU, True),
        (x, None, None, residual.to(BF16), None, *states, None, 0, False, *at, *TANH_FIRST, False),
        (x, weight, None, residual.double(), mask, *absent, 0.1, 1, False, *at, *SILU, False),
    ]
    evaluate = [
        (x, *statistics, weight, bias, residual, mask, *at, *RELU, True),
        (x, *statistics, None, None, residual.double(), None, *at, *TANH_FIRST, False),
    ]
    backward = [  # the tensors; training, activation, dtypes of dx and dresidual, what is wanted
        ((dy, x, *statistics, weight, bias, None, bits, mask, count), True, RELU, F32, F32, EVERY),
        ((dy, x, *statistics, weight, bias, residual, *absent), True, SILU, F32, BF16, EVERY),
        ((dy.double(), x, *wider, weight, *absent, mask, count), True, TANH_FIRST, F32, F64, EVERY),
        ((dy, *frozen, None, bits, *absent[:2]), False, RELU, F16, F32, [True, False, True, True]),
        ((dy, *frozen, None, None, mask, None), False, PLAIN, F32, F32, [True, False, False, True]),
    ]
    yield ops.batch_stats, (x, mask, 1)
    for arguments in train:
        yield ops.batch_norm_train, arguments
    for arguments in evaluate:
        yield ops.batch_norm_eval, arguments
    for tensors, training, activation, *dtypes, wanted in backward:
        rest = (EPS, training, 1, *activation, False, *dtypes, wanted)
        yield ops.batch_norm_backward, (*tensors, *rest)


@pytest.mark.parametrize("shape", [(3, 5, 9), (0, 5, 9), (3, 5, 0), (3, 0, 9)], ids=str)
def test_operators_are_what_their_schemas_and_fakes_say(shape):
    for operator, arguments in calls(shape):
        torch.library.opcheck(operator, arguments)


SHAPES = [(3, 5, 9), (2, 8, 16), (2, 3, 7), (17, 6), (16, 24), (1, 1, 1), (2, 1, 9), (5, 1)]


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_unpack_is_the_inverse_of_pack(shape, axis, layout):
    y = LAYOUTS[layout](torch.randn(shape))
    axis %= y.dim()
    on = torch.rand(shape) < 0.5
    bits = reference.pack(on, y, axis)
    assert bits.dtype == torch.uint8
    assert bits.shape == reference.new_bits(y, axis).shape
    runs = [size for d, size in enumerate(shape) if y.stride(d) != 1] if y.numel() else []
    assert bits.numel() <= max(y.numel(), *runs, 0)
    assert sum(int(byte).bit_count() for byte in bits.flatten()) == on.sum()
    signs = reference.unpack(bits, y, axis)
    assert torch.equal(signs, on.float() * 2 - 1)
    assert strides(signs) == strides(y)
