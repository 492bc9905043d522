"""Products of few rows with a large matrix on a CPU, at the speed of reading the matrix.

``F.linear`` makes the rows the left operand of a library product, whose kernels walk along them:
where there are one or few, they reach half the memory's speed. With the matrix on the left they
walk along its rows, and read it as fast as it comes. No gradients.
"""

import functools
import math

import torch
from torch import Tensor

from transnormer.ops import checks

# Bits of the inputs that a product with integers keeps, counted from a row's largest.
_BITS = 22
# What turns a number into digits -128 to 127 of base 256, and their weights; the last digit is 0.
_OFFSET, _BASE = 0x808080, (1.0, 256.0, 65_536.0, 0.0)
# So many products of two signed bytes stay within 32 bits.
_MOST_INPUTS = 1 << 16


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, as ``F.linear`` gives it: the library's sums, float32 for half precision.

    Args:
        x: [rows, inputs] on a CPU.
        weight: [outputs, inputs], of x's dtype.

    Returns:
        [rows, outputs] of x's dtype.
    """
    if len(x) == 1:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return torch.mm(weight, x.t()).t().contiguous()


@functools.cache
def reads_integers(inputs: int) -> bool:
    """Whether ``int8_product`` takes so many inputs, and this CPU and torch have what it needs.

    Without oneDNN, or 512-bit instructions, torch's product of integers is a plain loop, or slow.
    """
    fast = torch.backends.mkldnn.is_available() and inputs <= _MOST_INPUTS
    return fast and torch.backends.cpu.get_cpu_capability() == "AVX512"


def int8_product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x (W diag(scales))^T for a matrix of integers, which is read as it is.

    A row of x is taken as integers of 22 bits and a sign, times a power of two that its largest
    element sets: bfloat16 elements down to 2^-14 of the largest are kept exactly, smaller ones and
    float32 are rounded at 2^-23 of it. Their three bytes are three columns of a product of integers,
    whose sums are exact; joining these, and the scales, are float32. A row with NaN or infinity
    gives NaN.

    Args:
        x: [rows, inputs], float32, bfloat16 or float16 on a CPU; at most 65,536 inputs.
        weight: int8 [outputs, inputs].
        scales: [outputs] or [outputs, 1], of any float dtype.

    Returns:
        [rows, outputs] of x's dtype.
    """
    rows, inputs = x.shape
    largest = x.abs().amax(1).tolist()
    steps = [math.ldexp(1.0, math.frexp(most)[1] - _BITS) for most in largest]
    # Else 1 / step would not be finite in float32 for the smallest rows.
    steps = [max(step, 2.0**-126) for step in steps]
    inverse = torch.tensor([1.0 / step for step in steps]).unsqueeze(1)
    integers = (x * inverse).round_().to(torch.int32).t().reshape(-1)
    digits = integers.add_(_OFFSET).bitwise_xor_(_OFFSET).view(torch.int8)
    sums = torch._int_mm(weight, digits.view(inputs, 4 * rows)).view(len(weight), rows, 4).float()
    # Autocast would round the sums to half precision.
    with checks.no_autocast("cpu"):
        y = torch.matmul(sums, torch.tensor(_BASE))
    units = [step if math.isfinite(most) else math.nan for step, most in zip(steps, largest)]
    y = y * scales.view(-1, 1).float() * torch.tensor(units)
    return y.t().to(x.dtype).contiguous()
