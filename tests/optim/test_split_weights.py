"""float32 weights in two halves: the same bits again, and the nearest bfloat16 in the upper one."""

import pytest
import torch
from torch import nn

from transnormer.optim.split_weights import joined, leave_remainder, split, take_remainder


def test_both_halves_are_the_float32_again() -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (100_000,), dtype=torch.int64).to(torch.int32)
    edges = [0.0, -0.0, float("inf"), -float("inf"), 1.0, 1 + 2.0**-8, 1 - 2.0**-9, 2.0**-140]
    x = torch.cat([bits.view(torch.float32), torch.tensor(edges)])
    x = x[~x.isnan()]
    high, low = split(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(joined(high, low).view(torch.int32), x.view(torch.int32))


def test_the_upper_half_is_the_nearest() -> None:
    torch.manual_seed(1)
    x = torch.randn(50_000)
    high = split(x)[0]
    nearest = x.to(torch.bfloat16)
    assert torch.equal((high - x).abs(), (nearest - x).abs())
    # Of two as near the one away from zero.
    assert split(torch.tensor([1 + 2.0**-8, -1 - 2.0**-8]))[0].tolist() == [1.0078125, -1.0078125]


def test_nan_stays_nan() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32)
    high, low = split(bits.view(torch.float32))
    assert high.isnan().all()
    assert joined(high, low).isnan().all()


def test_other_remainders_are_refused() -> None:
    high, low = split(torch.ones(3))
    with pytest.raises(TypeError, match="a remainder is torch.bfloat16; expected torch.int16"):
        joined(high, low.view(torch.bfloat16))


def test_a_remainder_is_taken_once() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    assert take_remainder(parameter) is None
    leave_remainder(parameter, low := torch.ones(3, dtype=torch.int16))
    assert take_remainder(parameter) is low
    assert take_remainder(parameter) is None
