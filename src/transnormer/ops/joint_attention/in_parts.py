"""The joint op on a part of longer rows, whose states pass between ranks in its middle."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transnormer.ops import checks
from transnormer.ops.dispatch import choose
from transnormer.ops.joint_attention import IMPLEMENTATIONS, checked, needs_triton, request_of
from transnormer.ops.linear_attention.constant_decay import Exchange


class _InParts(torch.autograd.Function):
    """The kernels around two exchanges, one in each pass; no graph can hold those."""

    @staticmethod
    def forward(
        ctx: Any,
        joint: Tensor,
        log_decay: Tensor | None,
        head_dim: int,
        eps: float,
        ahead: Exchange,
        back: Exchange,
    ) -> Tensor:
        from transnormer.ops.joint_attention import triton_joint

        y, o, active, states = triton_joint.forward(joint, log_decay, None, head_dim, eps, ahead)
        ctx.save_for_backward(joint, o, active, states, log_decay)
        ctx.head_dim, ctx.eps, ctx.back = head_dim, eps, back
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from transnormer.ops.joint_attention import triton_joint

        joint, o, active, states, log_decay = ctx.saved_tensors
        d_joint = triton_joint.backward(
            grad, joint, o, active, states, log_decay, None, ctx.head_dim, ctx.eps, ctx.back
        )
        return d_joint, None, None, None, None, None


def joint_attention_in_parts(
    joint: Tensor,
    log_decay: Tensor | None,
    *,
    head_dim: int,
    eps: float,
    ahead: Exchange,
    back: Exchange,
    implementation: str = "auto",
) -> Tensor:
    """``joint_attention`` of rows whose tokens are parts of longer ones; kernels alone can.

    With S the state that enters the part, M what the part leaves from zero and a the decay of its
    tokens together, S' = a S + M leaves it. One pass over k and v sums M, ``ahead`` finds S from the M
    of all parts, and one sweep from S gives the outputs. Backward one pass over q and do sums
    dS = sum_i exp(g (i + 1)) q_i^T do_i, ``back`` finds D, the gradient of S', from the dS of all
    parts, and one sweep from S and D gives the whole gradient. M, dS, S and D are float32. The passes
    are those that ``joint_attention`` makes over rows in segments, with the last segment too; a part
    that is one segment has them as well. Each exchange is called once, and nothing of it is
    recorded for autograd. There is no second derivative. Source: Sun et al. 2024, arXiv:2404.02882.

    Args:
        joint, log_decay, head_dim, eps: as ``joint_attention``'s; joint is [batch, tokens of the
            part, 4 * heads * head_dim].
        ahead: takes M and returns S, [batch, heads, head_dim, head_dim], float32.
        back: takes dS and returns D, likewise; called in the backward pass.
        implementation: "auto" or "triton", which runs in Triton's interpreter too.

    Returns:
        y, [batch, tokens of the part, heads * head_dim] in joint's dtype, under autocast in that one.

    Raises:
        ValueError: shapes, a device, another implementation.
        TypeError: dtypes, or what is no tensor.
        NotImplementedError, RuntimeError: the kernels cannot run this call, see ``runs_in_parts``.
    """
    joint = checked(joint, log_decay, None, head_dim)
    request = request_of(joint, log_decay, head_dim=head_dim, implementation=implementation)
    # The kernels' row alone: no other one can hand states on in its middle.
    choose("joint_attention_in_parts", IMPLEMENTATIONS[:1], request, implementation)
    # Autocast has done its part.
    with checks.no_autocast(joint.device.type):
        return _InParts.apply(joint, log_decay, head_dim, eps, ahead, back)


def runs_in_parts(
    joint: Tensor, log_decay: Tensor | None, *, head_dim: int, implementation: str = "auto"
) -> bool:
    """Whether the kernels can run this call; neither its length nor any value decides."""
    request = request_of(joint, log_decay, head_dim=head_dim, implementation=implementation)
    return needs_triton(request) is None
