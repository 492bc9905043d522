"""TransNormerLLM's mixing from its joint projection to its output projection as one op."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.ops import checks, kernel_ops
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.kernel_devices import why_not_named
from transnormer.ops.kernel_ops import Form
from transnormer.ops.linear_attention import constant_decay, linear_attention
from transnormer.ops.norm import rms_norm

# Of a head in linear attention's kernels, and of a whole row in those beside them.
_LARGEST_HEAD, _LARGEST_WIDTH = 256, 16_384


def _kept_states(joint, cu_seqlens, heads, head_dim):
    """Room for the states that enter the segments of rows; none where a row is one, or packed."""
    units = 0
    if cu_seqlens is None:
        batch, seq = joint.shape[:2]
        plan = constant_decay.plan(batch, seq, heads, joint.device)
        units = plan.units if plan.carried else 0
    return joint.new_empty(units, heads, head_dim, head_dim, dtype=torch.float32)


def _fake(joint, log_decay, cu_seqlens, head_dim, eps):
    *rows, width = joint.shape
    states = _kept_states(joint, cu_seqlens, width // (4 * head_dim), head_dim)
    return (*(joint.new_empty(*rows, width // parts) for parts in (4, 4, 2)), states)


def _fake_backward(grad, joint, o, active, states, log_decay, cu_seqlens, head_dim, eps):
    return joint.new_empty(joint.shape)


def _setup_context(ctx, inputs, output) -> None:
    joint, log_decay, cu_seqlens, ctx.head_dim, ctx.eps = inputs
    ctx.save_for_backward(joint, *output[1:], log_decay, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, *_):
    if grad is None:
        return None, None, None, None, None
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.head_dim, ctx.eps)
    return grads, None, None, None, None


_ARGUMENTS = "Tensor? log_decay, Tensor? cu_seqlens, int head_dim, float eps"
_op, _backward_op = kernel_ops.define(
    "joint_attention",
    "transnormer.ops.joint_attention.triton_joint",
    Form(f"(Tensor joint, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake),
    Form(
        "(Tensor grad, Tensor joint, Tensor o, Tensor active, Tensor states, "
        f"{_ARGUMENTS}) -> Tensor",
        _fake_backward,
    ),
    _setup_context,
    _gradients,
)


class Request(NamedTuple):
    """The facts of a call that decide which implementations can run it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    width: int
    trained_decay: bool
    named: bool


def needs_triton(request: Request) -> Exception | None:
    """Why the kernels cannot run a call; None where they can."""
    reason = why_not_named(request.device, request.named)
    if reason is not None:
        return RuntimeError(f"implementation 'triton': {reason}, or use 'auto' or 'torch'")
    if request.dtype == torch.float64:
        what, expected = "joint is torch.float64", "float32, bfloat16 or float16"
    elif request.head_dim > _LARGEST_HEAD or request.width > _LARGEST_WIDTH:
        what = f"head_dim is {request.head_dim} and the width {request.width}"
        expected = f"at most {_LARGEST_HEAD} and {_LARGEST_WIDTH}"
    elif request.trained_decay:
        what, expected = "log_decay wants a gradient", "a constant one"
    else:
        return None
    return NotImplementedError(
        f"implementation 'triton': {what}; expected {expected}; use 'auto' or 'torch'"
    )


def _run_triton(joint, log_decay, cu_seqlens, head_dim, eps):
    return _op(joint, log_decay, cu_seqlens, head_dim, eps)[0]


def _run_torch(joint, log_decay, cu_seqlens, head_dim, eps):
    *parts, u = joint.chunk(4, -1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    o, _ = linear_attention(F.silu(q), F.silu(k), v, log_decay, cu_seqlens=cu_seqlens)
    o = o.flatten(2)
    return rms_norm(o.to(checks.accumulation_dtype(o.dtype)), eps).to(o.dtype) * u


# The first automatic row that does not refuse runs.
IMPLEMENTATIONS = (
    Implementation("triton", needs_triton, _run_triton),
    Implementation("torch", lambda _: None, _run_torch),
)


def joint_attention(
    joint: Tensor,
    log_decay: Tensor | None,
    *,
    head_dim: int,
    eps: float,
    cu_seqlens: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """y = norm(merge(o)) u with o = linear_attention(silu(q), silu(k), v, log_decay).

    joint is [q, k, v, u] beside each other, as one projection makes them; norm(x) is
    x / sqrt(mean(x^2) + eps) over all heads. What lies between products and attention is computed in
    float32. "triton" keeps joint, silu(q), silu(k), o and the states that enter the segments of long
    rows for the backward pass, which writes all parts of the gradient of joint at their places. No
    gradient of log_decay, no states: those need ``linear_attention`` itself. Source: Qin et al. 2023,
    arXiv:2307.14995, section 3.1; the released code has the activations.

    Args:
        joint: [batch, seq, 4 * heads * head_dim], a floating dtype; autocast casts it.
        log_decay: None or [heads], at most 0.
        head_dim: of q, k and v.
        eps: of the norm.
        cu_seqlens: bounds of packed sequences, as ``linear_attention`` has them.
        implementation: "auto", "triton" or "torch".

    Returns:
        y, [batch, seq, heads * head_dim] in joint's dtype, under autocast in that one.

    Raises:
        ValueError: shapes, a device, an unknown implementation.
        TypeError: dtypes, or what is no tensor.
        NotImplementedError, RuntimeError: the named implementation cannot run this call.
    """
    joint = checked(joint, log_decay, cu_seqlens, head_dim)
    request = request_of(joint, log_decay, head_dim=head_dim, implementation=implementation)
    row: Any = choose("joint_attention", IMPLEMENTATIONS, request, implementation)
    # Autocast has done its part.
    with checks.no_autocast(joint.device.type):
        return row.run(joint, log_decay, cu_seqlens, head_dim, eps)


def request_of(
    joint: Tensor, log_decay: Tensor | None, *, head_dim: int, implementation: str = "auto"
) -> Request:
    """The facts of a call; joint's dtype is that which autocast leaves."""
    return Request(
        device=joint.device,
        dtype=checks.autocast_dtype(joint),
        head_dim=head_dim,
        width=joint.shape[-1] // 4,
        trained_decay=log_decay is not None and log_decay.requires_grad and torch.is_grad_enabled(),
        named=implementation == "triton",
    )


def checked(
    joint: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, head_dim: int
) -> Tensor:
    """joint in the dtype that autocast leaves; raises as ``joint_attention``."""
    checks.check_tensor("joint", joint)
    checks.check_tensor("log_decay", log_decay, optional=True)
    checks.check_tensor("cu_seqlens", cu_seqlens, optional=True)
    checks.check_rank("joint", joint, "batch seq width")
    checks.check_float("joint", joint)
    joint = joint.to(checks.autocast_dtype(joint))
    if head_dim < 1 or joint.shape[-1] % (4 * head_dim) or joint.shape[-1] == 0:
        raise ValueError(
            f"joint has shape {list(joint.shape)}; expected a width that is a multiple of 4 "
            f"head_dim, which is {head_dim}"
        )
    heads = joint.shape[-1] // (4 * head_dim)
    if log_decay is not None:
        checks.check_shape("log_decay", log_decay, (heads,), "heads")
        if log_decay.device != joint.device:
            raise ValueError(
                f"log_decay is on {log_decay.device}; expected {joint.device}; move it"
            )
        checks.check_log_decay_values(log_decay)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, joint.shape[0], joint.shape[1], joint.device)
    return joint
