"""The complex scan computes the recurrence, its gradients too, whatever the factors are."""

from typing import Any

import pytest
import torch
from kernel_cases import needs_interpreter
from tolerances import GRADIENT, OUTPUT, STATE, assert_close
from torch import Tensor

from transnormer.ops.scan import complex_scan

WIDTH = 5


def loop(a: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + x_t in complex128, token by token; pairs in, pairs out."""
    a, x, h = (torch.view_as_complex(y.double().contiguous()) for y in (a, x, state))
    found = []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        found.append(h)
    return torch.view_as_real(torch.stack(found, 1)), torch.view_as_real(h)


def make(
    seq: int, batch: int = 2, rows: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors inside the unit circle, inputs and a state."""
    size = torch.rand(batch, seq, WIDTH).double()
    angle = 6.3 * torch.rand(batch, seq, WIDTH).double()
    a = torch.stack([size * angle.cos(), size * angle.sin()], -1)
    x = torch.randn(batch, seq, WIDTH, 2)
    return a.to(dtype), x.to(dtype), torch.randn(rows or batch, WIDTH, 2).to(dtype)


# The kernels cut rows into units of 16 tokens.
FORMS = [("torch", torch.float64), ("torch", torch.float32)]
FORMS += [pytest.param("triton", torch.float32, marks=needs_interpreter)]


@pytest.mark.parametrize("seq", [1, 2, 3, 17, 48, 65])
@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=str)
def test_matches_the_loop(seq: int, form: str, dtype: torch.dtype) -> None:
    a, x, state = make(seq, dtype=dtype)
    h, after = complex_scan(a, x, initial_state=state, implementation=form)
    exact, exact_after = loop(a, x, state)
    assert_close(h, exact, limit=OUTPUT[dtype])
    assert_close(after, exact_after, limit=STATE[dtype])


def test_no_state_is_zero() -> None:
    a, x, state = make(20)
    h, after = complex_scan(a, x)
    exact, exact_after = complex_scan(a, x, initial_state=torch.zeros_like(state))
    assert torch.equal(h, exact)
    assert torch.equal(after, exact_after)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=str)
def test_gradients_match_those_of_the_loop(packed: bool, form: str, dtype: torch.dtype) -> None:
    bounds = [0, 0, 4, 5, 30, 30] if packed else [0, 30]
    rows = len(bounds) - 1
    inputs = [y.requires_grad_() for y in make(30, batch=1, rows=rows, dtype=dtype)]
    a, x, state = inputs
    weights, state_weights = torch.randn(1, 30, WIDTH, 2), torch.randn(rows, WIDTH, 2)
    cu_seqlens = torch.tensor(bounds) if packed else None
    h, after = complex_scan(a, x, initial_state=state, cu_seqlens=cu_seqlens, implementation=form)
    grads = torch.autograd.grad((h * weights).sum() + (after * state_weights).sum(), inputs)
    parts, ends = [], []
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        end = state[i : i + 1]
        if stop > start:
            part, end = loop(a[:, start:stop], x[:, start:stop], end)
            parts.append(part)
        ends.append(end)
    exact, exact_after = torch.cat(parts, 1), torch.cat(ends)
    assert_close(h, exact)
    assert_close(after, exact_after)
    wanted = torch.autograd.grad(
        (exact * weights).sum() + (exact_after * state_weights).sum(), inputs
    )
    for actual, other in zip(grads, wanted):
        assert_close(actual, other.double(), limit=GRADIENT[dtype])


@needs_interpreter
@pytest.mark.parametrize("seq", [7, 20])
def test_what_lies_behind_the_factors_does_not_matter(seq: int) -> None:
    a, x, _ = make(seq, batch=1, dtype=torch.float32)
    found = []
    for behind in (torch.full_like(a, float("nan")), torch.zeros_like(a)):
        leaves = torch.cat([a, behind])[:1].requires_grad_(), x.clone().requires_grad_()
        h, _ = complex_scan(*leaves, implementation="triton")
        found.append(torch.autograd.grad(h.square().sum(), leaves))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_second_derivatives_are_right() -> None:
    inputs = [y.requires_grad_() for y in make(5, batch=1)]
    assert torch.autograd.gradgradcheck(
        lambda a, x, s: complex_scan(a, x, initial_state=s)[0], inputs
    )


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0], ids=["none", "tiny", "all"])
def test_extreme_factors_are_as_good_as_others(size: float) -> None:
    a, x, state = make(200, dtype=torch.float32)
    a = size * a / a.square().sum(-1, keepdim=True).sqrt()
    inputs = [y.requires_grad_() for y in (a, x, state)]
    h, _ = complex_scan(*inputs[:2], initial_state=inputs[2])
    assert_close(h, loop(a, x, state)[0])
    for grad in torch.autograd.grad(h.square().sum(), inputs):
        assert bool(torch.isfinite(grad).all())


def test_no_tokens_keep_the_state() -> None:
    a, x, state = make(0)
    h, after = complex_scan(a, x, initial_state=state)
    assert h.shape == x.shape
    assert torch.equal(after, state)


def test_the_state_holds_no_memory_of_the_sequence() -> None:
    a, x, _ = make(50)
    _, after = complex_scan(a, x)
    assert after.untyped_storage().nbytes() == after.numel() * after.element_size()


def test_the_library_op_passes_opcheck() -> None:
    a, x, _ = make(9)
    op = torch.ops.transnormer.complex_scan.default
    torch.library.opcheck(op, (a.requires_grad_(), x.requires_grad_()))


@needs_interpreter
def test_the_library_op_of_the_kernels_passes_opcheck() -> None:
    a, x, _ = make(3, dtype=torch.float32)
    op = torch.ops.transnormer.complex_scan_kernel.default
    torch.library.opcheck(op, (a.requires_grad_(), x.requires_grad_()))
    grad = torch.autograd.grad(op(a, x).sum(), x, create_graph=True)[0].sum()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad, a)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x has shape"),
        ({"x": torch.zeros(2, 3, WIDTH, 3)}, ValueError, r"x has shape.*expected \[2, 3, \d+, 2\]"),
        ({"a": torch.zeros(2, 4, WIDTH, 2)}, ValueError, "a has shape"),
        ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens is list; expected a tensor or None"),
        ({"x": torch.zeros(2, 3, WIDTH, 2).half()}, TypeError, "x is torch.float16"),
        ({"a": torch.zeros(2, 3, WIDTH, 2).double()}, TypeError, "a is torch.float64"),
        ({"initial_state": torch.zeros(3, WIDTH, 2)}, ValueError, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "batch is 2"),
        ({"cu_seqlens": torch.tensor(3)}, ValueError, r"cu_seqlens has shape \[\]"),
        ({"implementation": "none"}, ValueError, "implementation of complex_scan is 'none'"),
    ],
)
def test_wrong_inputs_are_refused(
    changes: dict[str, Any], error: type[Exception], named: str
) -> None:
    inputs = {"a": torch.zeros(2, 3, WIDTH, 2), "x": torch.zeros(2, 3, WIDTH, 2)}
    if "cu_seqlens" in changes:
        inputs["initial_state"] = torch.zeros(1, WIDTH, 2)
    inputs |= changes
    with pytest.raises(error, match=named):
        complex_scan(inputs.pop("a"), inputs.pop("x"), **inputs)
