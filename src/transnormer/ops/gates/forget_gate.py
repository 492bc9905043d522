"""A forget gate with a lower bound, as log decay and its complement (HGRN, HGRN2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.ops import checks, kernel_ops
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.kernel_ops import Form, Request, needs_triton


def _fake(z, bound, dtype):
    return z.new_empty(z.shape, dtype=torch.float32), z.new_empty(z.shape, dtype=dtype)


def _fake_backward(d_log, d_taken, z, bound, with_bound):
    width = z.shape[-1] if with_bound else 0
    return z.new_empty(z.shape), z.new_empty(width, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    z, bound, _ = inputs
    ctx.save_for_backward(z, bound)


def _gradients(ctx, d_log, d_taken):
    z, bound = ctx.saved_tensors
    with_bound = bound is not None and ctx.needs_input_grad[1]
    dz, d_bound = _backward_op(d_log, d_taken, z, bound, with_bound)
    return dz, d_bound.to(bound.dtype) if with_bound else None, None


_op, _backward_op = kernel_ops.define(
    "forget_gate",
    "transnormer.ops.gates.triton_forget_gate",
    Form("(Tensor z, Tensor? bound, ScalarType dtype) -> (Tensor, Tensor)", _fake),
    Form(
        "(Tensor d_log, Tensor d_taken, Tensor z, Tensor? bound, bool with_bound) "
        "-> (Tensor, Tensor)",
        _fake_backward,
    ),
    _setup_context,
    _gradients,
)


def _run_triton(z: Tensor, bound: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _op(z, bound, dtype)


def _run_torch(z: Tensor, bound: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z = z.to(checks.accumulation_dtype(z.dtype))
    forgotten = torch.sigmoid(-z)
    log_gate = F.logsigmoid(z)
    if bound is None:
        return log_gate, forgotten.to(dtype)
    bound = bound.to(z.dtype)
    forgotten = (1.0 - bound) * forgotten
    # log(0) has an infinite gradient, which would be NaN times the 0 of where.
    safe = torch.where(bound > 0, bound, 1.0)
    bounded = torch.logaddexp(safe.log(), torch.log1p(-bound) + log_gate)
    small = torch.where(bound > 0, bounded, log_gate)
    log_gate = torch.where(forgotten < 0.5, torch.log1p(-forgotten.clamp(max=0.5)), small)
    return log_gate, forgotten.to(dtype)


# The first automatic row that does not refuse runs.
IMPLEMENTATIONS = (
    Implementation("triton", needs_triton, _run_triton),
    Implementation("torch", lambda _: None, _run_torch),
)


def forget_gate(
    z: Tensor,
    bound: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """log f and 1 - f of f = bound + (1 - bound) sigmoid(z).

    Both are computed in max(float32, z's dtype) and keep their relative precision where f is near
    1, which decides how long a channel remembers, and where it is near 0; bound = 0 is exact. The
    gradient of a bound of 0 is finite, and means nothing where f underflows.

    "triton" reads z once each way and keeps nothing else for the backward pass; the gradient of the
    bound is summed over the tokens in float32 and in a fixed order.

    Args:
        z: [..., width], a floating dtype.
        bound: [width], 0 <= bound < 1; None is 0.
        dtype: of 1 - f; None is float32 (float64 for float64 z). It is rounded once.
        implementation: "auto", "triton" or "torch".

    Returns:
        log f, at most 0, float32 (float64 for float64 z), and 1 - f, both [..., width].

    Raises:
        ValueError: shapes, a device, an unknown implementation, or (CPU, eager) another bound.
        TypeError: dtypes, or what is no tensor.
        NotImplementedError, RuntimeError: the named implementation cannot run this call.
    """
    checks.check_tensor("z", z)
    checks.check_tensor("bound", bound, optional=True)
    checks.check_float("z", z)
    if z.dim() == 0:
        raise ValueError("z has shape []; expected [..., width]")
    if dtype is not None and dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"dtype is {dtype}; expected float64, float32, bfloat16 or float16")
    if bound is not None:
        checks.check_float("bound", bound)
        checks.check_shape("bound", bound, z.shape[-1:], "width")
        if bound.device != z.device:
            raise ValueError(f"bound is on {bound.device}; expected {z.device}; move it")
        if checks.values_are_visible(bound) and not bool(((bound >= 0) & (bound < 1)).all()):
            raise ValueError(
                f"bound holds {float(bound.min())} to {float(bound.max())}; expected 0 <= bound < 1"
            )
    request = Request(z.device, z.dtype, named=implementation == "triton")
    row: Any = choose("forget_gate", IMPLEMENTATIONS, request, implementation)
    return row.run(z, bound, checks.accumulation_dtype(z.dtype) if dtype is None else dtype)
