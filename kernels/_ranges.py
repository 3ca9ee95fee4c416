"""What takes the raw numbers of an interface vector into their ranges, and the gradients through it."""

import triton
import triton.language as tl


@triton.jit
def clamped(x, bound):
    x = tl.where(x > bound, bound, x)
    return tl.where(x < -bound, -bound, x)


@triton.jit
def through_clamp(grad, x, bound):
    """None where x was outside."""
    return tl.where((x > bound) | (x < -bound), 0.0, grad)


@triton.jit
def sigmoid(x):
    small = tl.exp(tl.where(x < 0.0, x, -x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def sigmoid_slope(x):
    y = sigmoid(x)
    return y * (1.0 - y)


@triton.jit
def softplus(x):
    """ln(1 + e^x); the quotient makes up for what 1 + small rounds away. Its slope is the sigmoid."""
    small = tl.exp(tl.where(x < 0.0, x, -x))
    total = 1.0 + small
    rounded_away = total == 1.0
    log_total = tl.log(total) * (small / tl.where(rounded_away, 1.0, total - 1.0))
    return tl.where(x < 0.0, 0.0, x) + tl.where(rounded_away, small, log_total)


@triton.jit
def softmax(x):
    """Of a vector, padded by -inf."""
    power = tl.exp(x - tl.max(x, 0))
    return power / tl.sum(power, 0)


@triton.jit
def softmax_backward(y, grad):
    return y * (grad - tl.sum(y * grad, 0))
