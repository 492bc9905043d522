"""Linearized relative position encoding by cosine doubling: queries and keys turn with positions."""

import math
from typing import Any

import torch
from torch import Tensor

from transnormer.ops import checks, kernel_ops
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.kernel_ops import Form, Request, needs_triton


def _fake(x, y, positions, theta):
    made = x.new_empty(*x.shape[:3], 2 * x.shape[3])
    return made, x.new_empty(0) if y is None else y.new_empty(made.shape)


def _fake_backward(dx, dy, x, y, positions, theta):
    second = x.new_empty(0) if y is None else y.new_empty(y.shape)
    return x.new_empty(x.shape), second, theta.new_empty(theta.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dx, dy):
    x, y, positions, theta = ctx.saved_tensors
    dx, dy, d_theta = _backward_op(dx, None if y is None else dy, x, y, positions, theta)
    return dx, None if y is None else dy, None, d_theta


_op, _backward_op = kernel_ops.define(
    "lrpe",
    "transnormer.ops.lrpe.triton_lrpe",
    Form("(Tensor x, Tensor? y, Tensor positions, Tensor theta) -> (Tensor, Tensor)", _fake),
    Form(
        "(Tensor dx, Tensor? dy, Tensor x, Tensor? y, Tensor positions, Tensor theta) "
        "-> (Tensor, Tensor, Tensor)",
        _fake_backward,
    ),
    _setup_context,
    _gradients,
)


def turns(positions: Tensor, theta: Tensor, dtype: torch.dtype) -> Tensor:
    """position x theta mod 2 pi, [batch, seq, *theta.shape] in ``dtype`` from int64 [batch, seq].

    Computed in float64 and reduced before it is rounded, so that position 4,000,000 is as exact as
    position 0. Rows that are views of one row (batch stride 0) are computed once and broadcast:
    the result has then batch 1.
    """
    if positions.shape[0] > 1 and positions.stride(0) == 0:
        positions = positions[:1]
    angles = positions.to(torch.float64).view(*positions.shape, *[1] * theta.dim()) * theta.to(
        torch.float64
    )
    return torch.remainder(angles, 2.0 * math.pi).to(dtype)


def doubled(x: tuple[Tensor, ...], angles: Tensor) -> tuple[Tensor, ...]:
    """[y cos(angles); y sin(angles)] of each y of x, in y's dtype; see ``lrpe``."""
    cos, sin = angles.cos(), angles.sin()
    return tuple(torch.cat([y * cos, y * sin], -1).to(y.dtype) for y in x)


def _run_triton(x: tuple[Tensor, ...], positions: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    # Two at a time, as a query and its key are: the angles are the same.
    found: list[Tensor] = []
    for i in range(0, len(x), 2):
        second = x[i + 1] if i + 1 < len(x) else None
        found += _op(x[i], second, positions, theta)[: 1 if second is None else 2]
    return tuple(found)


def _run_torch(x: tuple[Tensor, ...], positions: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    return doubled(x, turns(positions, theta, checks.accumulation_dtype(theta.dtype)))


# The first automatic row that does not refuse runs.
IMPLEMENTATIONS = (
    Implementation("triton", needs_triton, _run_triton),
    Implementation("torch", lambda _: None, _run_torch),
)


def lrpe(
    x: tuple[Tensor, ...], positions: Tensor, theta: Tensor, *, implementation: str = "auto"
) -> tuple[Tensor, ...]:
    """y at position t becomes [y cos(t theta); y sin(t theta)], for each y of x.

    The score of a query and a key is then sum_j q_j k_j cos((t - s) theta_j): relative, at twice
    the key dim (Qin et al. 2023, arXiv:2307.14995, section 3.1). Angles are formed in float64 and
    reduced mod 2 pi before they are rounded to the accumulation dtype of theta. "triton" makes
    them in registers, once for two tensors, and again in the backward pass; theta's gradient is
    summed in float32 in a fixed order.

    Args:
        x: tensors [batch, seq, heads, head_dim].
        positions: int64 [batch, seq].
        theta: [heads, head_dim], float32 or float64.
        implementation: "auto", "triton" or "torch".

    Returns:
        Tensors [batch, seq, heads, 2 * head_dim], in the dtype of each of x.

    Raises:
        ValueError: shapes, an unknown implementation.
        TypeError: dtypes, or what is no tensor.
        NotImplementedError, RuntimeError: the named implementation cannot run this call.
    """
    checks.check_tensor("positions", positions)
    checks.check_tensor("theta", theta)
    checks.check_rank("positions", positions, "batch seq")
    checks.check_rank("theta", theta, "heads head_dim")
    if positions.dtype != torch.int64:
        raise TypeError(f"positions is {positions.dtype}; expected torch.int64; convert it")
    checks.check_float("theta", theta)
    if not x:
        return ()
    for y in x:
        checks.check_tensor("x", y)
        checks.check_float("x", y)
        checks.check_rank("x", y, "batch seq heads head_dim")
        checks.check_shape("x", y, (*positions.shape, *theta.shape), "batch seq heads head_dim")
    widest = torch.float64 if torch.float64 in (theta.dtype, *(y.dtype for y in x)) else x[0].dtype
    request = Request(x[0].device, widest, named=implementation == "triton")
    row: Any = choose("lrpe", IMPLEMENTATIONS, request, implementation)
    return row.run(x, positions, theta)
