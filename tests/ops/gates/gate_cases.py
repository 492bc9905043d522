"""What tests of gates share: both implementations, and how to compare what may be -inf."""

import pytest
import torch
from kernel_cases import needs_interpreter
from tolerances import assert_close
from torch import Tensor

TRITON = pytest.param("triton", marks=needs_interpreter)
both = pytest.mark.parametrize("implementation", ["torch", TRITON])


def weighted(results: tuple[Tensor, ...]) -> Tensor:
    """A sum of finite entries of results with weights that are the same in every dtype."""
    generator = torch.Generator(results[0].device).manual_seed(1)
    total = 0.0
    for x in results:
        weights = torch.randn(x.shape, generator=generator, device=x.device).bfloat16()
        finite = x.isfinite()
        total = total + (torch.where(finite, x, 0.0).double() * weights * finite).sum()
    return total


def assert_same_or_close(actual: Tensor, exact: Tensor, limit: float, name: str) -> None:
    """-inf in the same places, all else within the limit."""
    assert torch.equal(actual.isneginf(), exact.isneginf()), name
    finite = exact.isfinite()
    zero = torch.zeros((), dtype=actual.dtype, device=actual.device)
    kept = torch.where(finite, actual, zero)
    assert_close(kept, torch.where(finite, exact, 0.0), limit=limit, name=name)
