"""The elementwise parts of a gated linear unit on a joint projection [a, b], in Triton.

    y = act(a) b;    da = dy b act'(a);    db = dy act(a)

The products with the weight are torch's. The backward pass writes da and db beside each other and y
over dy. So each tensor crosses memory once, hidden_dim numbers a token: 3 of them forward, 6 backward.
Everything is computed in float32.

Legend: f hidden_dim, C columns of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops import checks
from transnormer.ops.linear_attention.triton_runtime import device_of, launch

# Elements that a program takes at once, 8 a thread.
_WIDTH, _WARPS = 1024, 4


@triton.jit
def product_kernel(joint, y, joint_row, f, SILU: tl.constexpr, C: tl.constexpr):
    """A block of a row of y."""
    blocks = tl.cdiv(f, C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * C + tl.arange(0, C)
    live = at < f
    a = tl.load(joint + row * joint_row + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(joint + row * joint_row + f + at, mask=live, other=0.0).to(tl.float32)
    if SILU:
        a *= tl.sigmoid(a)
    tl.store(y + row * f + at, (a * b).to(y.dtype.element_ty), mask=live)


@triton.jit
def product_backward_kernel(joint, y, d_joint, joint_row, f, SILU: tl.constexpr, C: tl.constexpr):
    """A block of a row of da and of db; y holds dy and gets y."""
    blocks = tl.cdiv(f, C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * C + tl.arange(0, C)
    live = at < f
    a = tl.load(joint + row * joint_row + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(joint + row * joint_row + f + at, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(y + row * f + at, mask=live, other=0.0).to(tl.float32)
    active, slope = a, 1.0
    if SILU:
        s = tl.sigmoid(a)
        active, slope = a * s, s * (1.0 + a * (1.0 - s))
    out = d_joint + row * (2 * f) + at
    kind: tl.constexpr = d_joint.dtype.element_ty
    tl.store(out, (dy * b * slope).to(kind), mask=live)
    tl.store(out + f, (dy * active).to(kind), mask=live)
    tl.store(y + row * f + at, (active * b).to(kind), mask=live)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, width] with a contiguous last dim."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(joint: Tensor, weight: Tensor, silu: bool) -> Tensor:
    """o, [..., model_dim]."""
    rows, f = _rows(joint), weight.shape[1]
    y = rows.new_empty(rows.shape[0], f)
    with device_of(joint), checks.no_autocast(joint.device.type):
        launch(
            product_kernel, rows.shape[0] * -(-f // _WIDTH), rows, y, rows.stride(0), f, SILU=silu,
            C=_WIDTH, num_warps=_WARPS,
        )  # fmt: skip
        o = y @ weight.mT
    return o.view(*joint.shape[:-1], weight.shape[0])


def backward(grad: Tensor, joint: Tensor, weight: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of joint and weight."""
    rows, grads, f = _rows(joint), grad.flatten(0, -2), weight.shape[1]
    d_joint = torch.empty(joint.shape, dtype=joint.dtype, device=joint.device)
    with device_of(joint), checks.no_autocast(joint.device.type):
        y = grads @ weight
        launch(
            product_backward_kernel, rows.shape[0] * -(-f // _WIDTH), rows, y, d_joint,
            rows.stride(0), f, SILU=silu, C=_WIDTH, num_warps=_WARPS,
        )  # fmt: skip
        d_weight = grads.mT @ y
    return d_joint, d_weight
