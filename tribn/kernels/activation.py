"""Activations on the device, each with its gradient: dy, the input z and the parameters p, q.

NaN and infinity come out as torch's functions give them. `tribn.activation.KINDS` has torch's side.
"""

import triton
import triton.language as tl

from tribn.activation import Activation


@triton.jit
def expm1(x):
    """exp(x) - 1, by its series where the difference would cancel: |x| < log(2) / 2."""
    TERMS: tl.constexpr = 13 if x.dtype == tl.float64 else 7
    series = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(TERMS, 1, -1):
        series = 1.0 + series * x * (1.0 / k)
    return tl.where(tl.abs(x) < 0.3465, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), by the series 2 * atanh(x / (2 + x)) where x is small."""
    TERMS: tl.constexpr = 23 if x.dtype == tl.float64 else 11
    s = x / (2.0 + x)
    series = tl.full(x.shape, 1.0 / TERMS, x.dtype)
    for k in tl.static_range(TERMS - 2, 0, -2):
        series = 1.0 / k + series * (s * s)
    return tl.where((x > -0.2929) & (x < 0.4143), 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def relu(z, p, q):
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_grad(dy, z, p, q):
    return tl.where(z <= 0.0, 0.0, dy)


@triton.jit
def relu6(z, p, q):
    return tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))


@triton.jit
def relu6_grad(dy, z, p, q):
    return tl.where((z <= 0.0) | (z >= 6.0), 0.0, dy)


@triton.jit
def leaky_relu(z, p, q):
    return tl.where(z > 0.0, z, z * p)


@triton.jit
def leaky_relu_grad(dy, z, p, q):
    return tl.where(z > 0.0, dy, dy * p)


@triton.jit
def leaky_relu_inverse(y, p, q):
    return tl.where(y > 0.0, y, y / p)


@triton.jit
def elu(z, p, q):
    return tl.where(z > 0.0, z, expm1(z) * p)


@triton.jit
def elu_grad(dy, z, p, q):
    return tl.where(z <= 0.0, dy * (tl.exp(z) * p), dy)


@triton.jit
def elu_inverse(y, p, q):
    """q is what keeps it from minus infinity."""
    return tl.where(y > 0.0, y, log1p(tl.maximum(y / p, q - 1.0)))


@triton.jit
def identity(z, p, q):
    return z


@triton.jit
def gelu(z, p, q):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_grad(dy, z, p, q):
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return dy * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)


@triton.jit
def gelu_tanh(z, p, q):
    """Its 0.5 * (1 + tanh(u)) is the sigmoid of 2 * u, where nothing cancels."""
    return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))


@triton.jit
def gelu_tanh_grad(dy, z, p, q):
    twice = 1.5957691216057308 * (z + 0.044715 * z * z * z)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    e = tl.exp(-tl.abs(twice))  # of the side where it does not overflow
    s = 1.0 / (1.0 + e)
    return dy * (tl.where(twice < 0.0, e * s, s) + z * (e * s * s) * slope)


@triton.jit
def silu(z, p, q):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_grad(dy, z, p, q):
    s = sigmoid(z, p, q)
    return dy * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def mish(z, p, q):
    """With n = exp(z) * (exp(z) + 2), tanh(log(1 + exp(z))) is n / (n + 2): 1 for z above 20."""
    e = tl.exp(tl.where(z > 20.0, 20.0, z))
    n = e * (e + 2.0)
    return z * (n / (n + 2.0))


@triton.jit
def mish_grad(dy, z, p, q):
    e = tl.exp(tl.where(z > 40.0, 40.0, z))  # beyond which the derivative is 1 in float64 too
    n = e * (e + 2.0)
    r = 1.0 / (n + 2.0)
    slope = tl.where(z > 40.0, 0.0, 4.0 * (e * r) * ((e + 1.0) * r))
    return dy * (n * r + z * slope)


@triton.jit
def sigmoid(z, p, q):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def sigmoid_grad(dy, z, p, q):
    s = sigmoid(z, p, q)
    return dy * (s * (1.0 - s))


@triton.jit
def tanh(z, p, q):
    e = expm1(-2.0 * tl.abs(z))
    t = -e / (e + 2.0)
    return tl.where(z < 0.0, -t, t)


@triton.jit
def tanh_grad(dy, z, p, q):
    t = tanh(z, p, q)
    return dy * (1.0 - t * t)


@triton.jit
def softplus(z, p, q):
    return tl.where(z * p > q, z, log1p(tl.exp(z * p)) * (1.0 / p))


@triton.jit
def softplus_grad(dy, z, p, q):
    return tl.where(z * p > q, dy, dy * sigmoid(z * p, p, q))


@triton.jit
def hardswish(z, p, q):
    return z * hardsigmoid(z, p, q)


@triton.jit
def hardswish_grad(dy, z, p, q):
    return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, dy * (z * (1.0 / 3.0) + 0.5), dy))


@triton.jit
def hardsigmoid(z, p, q):
    return tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, (z + 3.0) * (1.0 / 6.0)))


@triton.jit
def hardsigmoid_grad(dy, z, p, q):
    return tl.where((z > -3.0) & (z < 3.0), dy * (1.0 / 6.0), 0.0)


def functions(activation: Activation) -> tuple:
    """The device functions of an activation and of its gradient; None where there is none."""
    if activation.name is None:
        return None, None
    return globals()[activation.name], globals()[f"{activation.name}_grad"]


def inverse(activation: Activation) -> triton.JITFunction:
    """The device function that undoes an invertible activation."""
    return identity if activation.name is None else globals()[f"{activation.name}_inverse"]
