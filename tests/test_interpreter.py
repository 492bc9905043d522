"""The interpreter that the tests run kernels in patches its language once a launch, not for good."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import needs_interpreter

pytestmark = needs_interpreter


@triton.jit
def doubled(x, at):
    return tl.load(x + at) * 2.0


@triton.jit
def kernel(x, out, FAILS: tl.constexpr):
    at = tl.arange(0, 4)
    tl.static_assert(not FAILS)
    tl.store(out + at, doubled(x, at) + doubled(x, at))


def test_a_launch_that_fails_leaves_the_next_one_alone() -> None:
    x, out, load = torch.arange(4.0), torch.zeros(4), tl.load
    for _ in range(2):
        kernel[(1,)](x, out, FAILS=False)
        assert out.tolist() == [0.0, 4.0, 8.0, 12.0]
        with pytest.raises(Exception, match="AssertionError"):
            kernel[(1,)](x, out.zero_(), FAILS=True)
        assert tl.load is load
