"""A gated linear unit from its joint projection to its output as one op."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from transnormer.ops import checks, kernel_ops
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.kernel_ops import Form, Request


def _fake(joint, weight, silu):
    return joint.new_empty(*joint.shape[:-1], weight.shape[0])


def _fake_backward(grad, joint, weight, silu):
    return joint.new_empty(joint.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    joint, weight, ctx.silu = inputs
    ctx.save_for_backward(joint, weight)


def _gradients(ctx, grad):
    joint, weight = ctx.saved_tensors
    return *_backward_op(grad, joint, weight, ctx.silu), None


_op, _backward_op = kernel_ops.define(
    "gated_projection",
    "transnormer.ops.glu.triton_glu",
    Form("(Tensor joint, Tensor weight, bool silu) -> Tensor", _fake),
    Form(
        "(Tensor grad, Tensor joint, Tensor weight, bool silu) -> (Tensor, Tensor)", _fake_backward
    ),
    _setup_context,
    _gradients,
)


def _run_triton(joint: Tensor, weight: Tensor, silu: bool) -> Tensor:
    return _op(joint, weight, silu)


def _run_torch(joint: Tensor, weight: Tensor, silu: bool) -> Tensor:
    a, b = joint.chunk(2, -1)
    return ((F.silu(a) if silu else a) * b) @ weight.mT


# The first automatic row that does not refuse runs.
IMPLEMENTATIONS = (
    Implementation("triton", kernel_ops.needs_triton, _run_triton),
    Implementation("torch", lambda _: None, _run_torch),
)


def gated_projection(
    joint: Tensor, weight: Tensor, *, silu: bool = False, implementation: str = "auto"
) -> Tensor:
    """o = (act(a) b) weight^T of joint = [a, b], act the identity or silu.

    The products act(a) b and their gradients are computed in float32 and rounded once. "triton" keeps
    joint alone for the backward pass: one kernel makes the gradients of a and b, beside each other,
    and act(a) b again, which the gradient of weight needs.
    Source: Qin et al. 2023, arXiv:2307.14995, section 3.1 (SGLU); Shazeer 2020, arXiv:2002.05202.

    Args:
        joint: [..., 2 * hidden_dim], a floating dtype, as one projection makes it; autocast casts it.
        weight: [model_dim, hidden_dim] in joint's dtype; autocast casts it.
        silu: of a.
        implementation: "auto", "triton" or "torch".

    Returns:
        o, [..., model_dim] in joint's dtype, under autocast in that one.

    Raises:
        ValueError: shapes, an unknown implementation.
        TypeError: dtypes, or what is no tensor.
        NotImplementedError, RuntimeError: the named implementation cannot run this call.
    """
    checks.check_tensor("joint", joint)
    checks.check_tensor("weight", weight)
    checks.check_float("joint", joint)
    checks.check_float("weight", weight)
    joint, weight = (x.to(checks.autocast_dtype(x)) for x in (joint, weight))
    if joint.dim() < 2 or joint.shape[-1] == 0 or joint.shape[-1] % 2:
        raise ValueError(
            f"joint has shape {list(joint.shape)}; expected [..., 2 * hidden_dim], two parts"
        )
    dims = "model_dim hidden_dim"
    checks.check_rank("weight", weight, dims)
    checks.check_shape("weight", weight, (weight.shape[0], joint.shape[-1] // 2), dims)
    checks.check_same("weight", weight, joint.dtype, joint.device, "joint")
    request = Request(joint.device, joint.dtype, named=implementation == "triton")
    row: Any = choose("gated_projection", IMPLEMENTATIONS, request, implementation)
    return row.run(joint, weight, silu)
