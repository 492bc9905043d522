"""float32 weights as a bfloat16 parameter and the 16 bits that it rounds away.

A float32 has the sign, the exponent and the first digits of a bfloat16 in its upper half. Rounded to the
nearest there, of two as near to the larger one, the lower half as a signed number is what is left over:
both together are the float32 again, bit for bit, in 4 bytes. (The same division as the parameter
remainders of NVIDIA's Transformer Engine.)
"""

import torch
from torch import Tensor

_LOW = 16
_HALF = 1 << (_LOW - 1)
_NAN = 0x7FC0


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as (bfloat16, int16) of its shape; a NaN is one in the first."""
    bits = x.contiguous().view(torch.int32)
    high = torch.where(x == x, (bits + _HALF) >> _LOW, _NAN)
    # Into the range of the signed, which a conversion would have to wrap to.
    low = torch.where(x == x, ((bits + _HALF) & 0xFFFF) - _HALF, 0)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that ``split`` divided; TypeError where low is no int16."""
    if low.dtype != torch.int16:
        raise TypeError(f"a remainder is {low.dtype}; expected torch.int16, as split makes it")
    upper = high.contiguous().view(torch.int16).to(torch.int32) << _LOW
    return (upper + low.to(torch.int32)).view(torch.float32)


def leave_remainder(parameter: Tensor, low: Tensor) -> None:
    """Leave beside a parameter, before it has an optimizer, what it rounds away of its weights."""
    parameter.__dict__["remainder"] = low


def take_remainder(parameter: Tensor) -> Tensor | None:
    """What ``leave_remainder`` left, once."""
    return parameter.__dict__.pop("remainder", None)
