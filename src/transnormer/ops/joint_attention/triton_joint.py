"""The elementwise parts around linear attention on a joint projection, in Triton.

    a = silu(q), b = silu(k);  o = attention(a, b, v);  r = (mean(o^2) + eps)^-1/2;  y = r o u

    n = dy u;  du = dy r o;  do = r n - o r^3 mean(o n);  dq = da silu'(q), dk = db silu'(k)

with silu'(x) = s + x s (1 - s), s = sigmoid(x). Every part of the joint gradient is written at its
place, so that nothing is copied together: da and db by attention's kernels, then silu' in place.
Everything is computed in float32. Source: Qin et al. 2023, arXiv:2307.14995, section 3.1.

Legend: h the width of q, k, v and u; W a power of two that holds it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention import triton_launch
from transnormer.ops.linear_attention.constant_decay import Exchange
from transnormer.ops.linear_attention.launch_config import block_of
from transnormer.ops.linear_attention.triton_runtime import device_of, launch

# Elements a program of the two kernels without sums takes at once, 8 a thread.
_WIDTH, _WARPS = 1024, 4


@triton.jit
def silu_kernel(joint, out, joint_row, out_row, h, C: tl.constexpr):
    """Blocks of silu of the first two parts of a row."""
    blocks = tl.cdiv(2 * h, C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * C + tl.arange(0, C)
    live = at < 2 * h
    x = tl.load(joint + row * joint_row + at, mask=live, other=0.0).to(tl.float32)
    y = x * tl.sigmoid(x)
    tl.store(out + row * out_row + at, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def norm_gate_kernel(o, joint, y, joint_row, h, eps, W: tl.constexpr):
    """A row of y."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, W)
    live = at < h
    x = tl.load(o + row * h + at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(joint + row * joint_row + 3 * h + at, mask=live, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / h + eps)
    tl.store(y + row * h + at, (x * scale * u).to(y.dtype.element_ty), mask=live)


@triton.jit
def norm_gate_backward_kernel(
    dy, o, joint, d_o, d_joint, dy_row, joint_row, h, eps, W: tl.constexpr
):
    """A row of do, and of du at its place in the joint gradient."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, W)
    live = at < h
    g = tl.load(dy + row * dy_row + at, mask=live, other=0.0).to(tl.float32)
    x = tl.load(o + row * h + at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(joint + row * joint_row + 3 * h + at, mask=live, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / h + eps)
    n = g * u
    share = tl.sum(x * n) / h * scale * scale
    grad = scale * (n - x * share)
    tl.store(d_o + row * h + at, grad.to(d_o.dtype.element_ty), mask=live)
    gate = (g * x * scale).to(d_joint.dtype.element_ty)
    tl.store(d_joint + row * (4 * h) + 3 * h + at, gate, mask=live)


@triton.jit
def silu_backward_kernel(joint, d_joint, joint_row, h, C: tl.constexpr):
    """Blocks of da and db in the first two parts of the joint gradient become dq and dk."""
    blocks = tl.cdiv(2 * h, C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * C + tl.arange(0, C)
    live = at < 2 * h
    x = tl.load(joint + row * joint_row + at, mask=live, other=0.0).to(tl.float32)
    where = d_joint + row * (4 * h) + at
    g = tl.load(where, mask=live, other=0.0).to(tl.float32)
    s = tl.sigmoid(x)
    tl.store(where, (g * (s + x * s * (1.0 - s))).to(d_joint.dtype.element_ty), mask=live)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, width] with a contiguous last dim."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _parts(active: Tensor, joint: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first two parts of ``active`` and the third of ``joint`` as heads, views."""
    h = joint.shape[-1] // 4
    q, k, v = active[..., :h], active[..., h : 2 * h], joint[..., 2 * h : 3 * h]
    heads = (-1, head_dim)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)


def _warps(width: int) -> int:
    """Of a program that holds a whole row."""
    return min(max(width // 256, 1), 16)


def forward(
    joint: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    head_dim: int,
    eps: float,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and o, [batch, seq, h], silu(q) and silu(k) beside each other, and states to keep.

    ``exchange`` as ``triton_launch.forward_and_states`` has it, for a part of longer rows.
    """
    h = joint.shape[-1] // 4
    with device_of(joint):
        rows = _rows(joint)
        active = joint.new_empty(*joint.shape[:-1], 2 * h)
        launch(
            silu_kernel, rows.shape[0] * -(-2 * h // _WIDTH), rows, active, rows.stride(0), 2 * h,
            h, C=_WIDTH, num_warps=_WARPS,
        )  # fmt: skip
        q, k, v = _parts(active, joint, head_dim)
        o, _, states = triton_launch.forward_and_states(
            q, k, v, log_decay, None, cu_seqlens, 1.0, False, exchange
        )
        if states is None or cu_seqlens is not None:
            # Documents have no bound on their number but the tokens': theirs are made again.
            states = o.new_empty(0, *o.shape[2:], head_dim, dtype=torch.float32)
        o = o.flatten(2)
        y, width = torch.empty_like(o), block_of(h, 1)
        launch(
            norm_gate_kernel, rows.shape[0], o, rows, y, rows.stride(0), h, eps, W=width,
            num_warps=_warps(width),
        )  # fmt: skip
    return y, o, active, states


def backward(
    grad: Tensor,
    joint: Tensor,
    o: Tensor,
    active: Tensor,
    states: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    head_dim: int,
    eps: float,
    exchange: Exchange | None = None,
) -> Tensor:
    """The gradient of the joint projection, [batch, seq, 4 h].

    ``exchange`` as ``triton_launch.backward`` has it.
    """
    h = joint.shape[-1] // 4
    with device_of(joint):
        rows, grads, width = _rows(joint), _rows(grad), block_of(h, 1)
        d_joint = torch.empty(joint.shape, dtype=joint.dtype, device=joint.device)
        o = o.contiguous()
        d_o = torch.empty_like(o)
        launch(
            norm_gate_backward_kernel, rows.shape[0], grads, o, rows, d_o, d_joint,
            grads.stride(0), rows.stride(0), h, eps, W=width, num_warps=_warps(width),
        )  # fmt: skip
        q, k, v = _parts(active, joint, head_dim)
        d_o = d_o.unflatten(-1, (-1, head_dim))
        triton_launch.backward(
            d_o, None, q, k, v, log_decay, None, cu_seqlens, 1.0, False, False, False,
            into=_parts(d_joint, d_joint, head_dim), states=states if len(states) else None,
            exchange=exchange,
        )  # fmt: skip
        launch(
            silu_backward_kernel, rows.shape[0] * -(-2 * h // _WIDTH), rows, d_joint,
            rows.stride(0), h, C=_WIDTH, num_warps=_WARPS,
        )  # fmt: skip
    return d_joint
