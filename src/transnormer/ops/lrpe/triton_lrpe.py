"""Cosine doubling of queries and keys in one pass over memory each way, in Triton.

    x -> [x cos(a); x sin(a)],  a = t theta;    dx = d1 cos(a) + d2 sin(a)
    dtheta = sum over tokens, of x and y alike, of t x (d2 cos(a) - d1 sin(a))

Angles are formed in float64, where t theta of position 4,000,000 keeps nine digits behind the point,
and reduced to the quadrant n and a rest r, |r| <= pi/4, whose sine and cosine are polynomials: a
table of angles would be as many bytes as x itself. x, y [B, T, H, K] with any row strides, positions
[B, T] with any, all else contiguous. Source: Qin et al. 2023, arXiv:2307.14995, section 3.1.

Legend: T tokens a row, H heads, K channels of a head, BK their power of two, N tokens a step, M
steps a program, R = B T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.launch_config import block_of
from transnormer.ops.linear_attention.triton_runtime import device_of, launch, walkable

# Arguments stand in lines as they belong together.
# fmt: off


_PER_QUADRANT: tl.constexpr = tl.constexpr(0.6366197723675814)
_QUADRANT: tl.constexpr = tl.constexpr(1.5707963267948966)
# Tokens a program: its partial sums of theta's gradient are 1 / 64 of a tensor's channels.
_TOKENS = 64


@triton.jit
def turn(position, theta):
    """cos and sin of position * theta, [N, BK], float32."""
    angle = position.to(tl.float64)[:, None] * theta.to(tl.float64)[None, :]
    whole = tl.floor(angle * _PER_QUADRANT + 0.5)
    rest = (angle - whole * _QUADRANT).to(tl.float32)
    quadrant = (whole - 4.0 * tl.floor(whole * 0.25)).to(tl.int32)
    square = rest * rest
    # Taylor's series; what they leave out is (pi/4)^11 / 11! = 2e-9 and (pi/4)^10 / 10! = 2e-8.
    sine = square * (1.0 / 362_880.0) - 1.0 / 5_040.0
    sine = sine * square + 1.0 / 120.0
    sine = sine * square - 1.0 / 6.0
    sine = sine * square * rest + rest
    cosine = square * (-1.0 / 3_628_800.0) + 1.0 / 40_320.0
    cosine = cosine * square - 1.0 / 720.0
    cosine = cosine * square + 1.0 / 24.0
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    odd = (quadrant & 1) == 1
    cos, sin = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return (
        tl.where((quadrant == 1) | (quadrant == 2), -cos, cos),
        tl.where(quadrant >= 2, -sin, sin),
    )


@triton.jit
def double(x, made, at, to, cos, sin, live, K: tl.constexpr):
    """Both halves of a tile of one tensor."""
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    tl.store(made + to, (value * cos).to(made.dtype.element_ty), mask=live)
    tl.store(made + to + K, (value * sin).to(made.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["R", "T"])
def lrpe_kernel(
    x, y, positions, theta, made_x, made_y, R, T, H, x_row, x_token, x_head, y_row, y_token, y_head,
    p_row, p_token,
    K: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BOTH: tl.constexpr,
):
    """M tiles of N tokens of one head."""
    head = (tl.program_id(0) % H).to(tl.int64)
    channels = tl.arange(0, BK)
    frequencies = tl.load(theta + head * K + channels, mask=channels < K, other=0.0)
    for step in tl.range(0, M, num_stages=3):
        token = (tl.program_id(0) // H * M + step) * N + tl.arange(0, N)
        # Division of int64 is a dozen instructions more, for nothing: no grid has 2^31 tokens.
        row, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
        live = (token < R)[:, None] & (channels < K)[None, :]
        position = tl.load(positions + row * p_row + t * p_token, mask=token < R, other=0)
        cos, sin = turn(position, frequencies)
        to = ((token.to(tl.int64) * H + head) * (2 * K))[:, None] + channels[None, :]
        at = (row * x_row + t * x_token + head * x_head)[:, None] + channels[None, :]
        double(x, made_x, at, to, cos, sin, live, K)
        if BOTH:
            at = (row * y_row + t * y_token + head * y_head)[:, None] + channels[None, :]
            double(y, made_y, at, to, cos, sin, live, K)


@triton.jit
def double_gradient(x, grad, dx, at, half, whole, cos, sin, live, K: tl.constexpr):
    """Stores dx of a tile; returns the gradient of its angles."""
    first = tl.load(grad + whole, mask=live, other=0.0).to(tl.float32)
    second = tl.load(grad + whole + K, mask=live, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    tl.store(dx + half, (first * cos + second * sin).to(dx.dtype.element_ty), mask=live)
    return value * (second * cos - first * sin)


@triton.jit(do_not_specialize=["R", "T"])
def lrpe_gradient_kernel(
    grad_x, grad_y, x, y, positions, theta, dx, dy, d_theta, R, T, H,
    x_row, x_token, x_head, y_row, y_token, y_head, p_row, p_token,
    K: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BOTH: tl.constexpr,
):
    """M tiles of dx and dy, and a row [K] of the sum of dtheta over their tokens."""
    head = (tl.program_id(0) % H).to(tl.int64)
    channels = tl.arange(0, BK)
    frequencies = tl.load(theta + head * K + channels, mask=channels < K, other=0.0)
    total = tl.zeros([N, BK], tl.float32)
    for step in tl.range(0, M, num_stages=3):
        token = (tl.program_id(0) // H * M + step) * N + tl.arange(0, N)
        # Division of int64 is a dozen instructions more, for nothing: no grid has 2^31 tokens.
        row, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
        live = (token < R)[:, None] & (channels < K)[None, :]
        position = tl.load(positions + row * p_row + t * p_token, mask=token < R, other=0)
        cos, sin = turn(position, frequencies)
        half = ((token.to(tl.int64) * H + head) * K)[:, None] + channels[None, :]
        whole = ((token.to(tl.int64) * H + head) * (2 * K))[:, None] + channels[None, :]
        at = (row * x_row + t * x_token + head * x_head)[:, None] + channels[None, :]
        d_angle = double_gradient(x, grad_x, dx, at, half, whole, cos, sin, live, K)
        if BOTH:
            at = (row * y_row + t * y_token + head * y_head)[:, None] + channels[None, :]
            d_angle += double_gradient(y, grad_y, dy, at, half, whole, cos, sin, live, K)
        total += position.to(tl.float32)[:, None] * d_angle
    to = tl.program_id(0).to(tl.int64) * K + channels
    tl.store(d_theta + to, tl.sum(total, 0), mask=channels < K)


def _constants(x: Tensor) -> tuple[int, dict[str, int]]:
    """Programs along the tokens, and a kernel's constants; 8 numbers a thread and step."""
    channels = block_of(x.shape[3])
    tokens = max(1024 // channels, 1)
    steps = max(_TOKENS // tokens, 1)
    constants = {"K": x.shape[3], "BK": channels, "N": tokens, "M": steps, "num_warps": 4}
    return max(-(-(x.shape[0] * x.shape[1]) // (tokens * steps)), 1), constants


def _strides(x: Tensor, y: Tensor, positions: Tensor) -> tuple[int, ...]:
    return (*x.stride()[:3], *y.stride()[:3], *positions.stride())


def forward(
    x: Tensor, y: Tensor | None, positions: Tensor, theta: Tensor
) -> tuple[Tensor, Tensor]:
    """x and y at twice their width; of no y an empty tensor."""
    batch, seq, heads, width = x.shape
    x, second, theta = walkable(x), None if y is None else walkable(y), theta.contiguous()
    made = x.new_empty(batch, seq, heads, 2 * width)
    made_y = x.new_empty(0) if second is None else second.new_empty(made.shape)
    programs, constants = _constants(x)
    with device_of(x):
        launch(
            lrpe_kernel, programs * heads, x, second, positions, theta, made, made_y, batch * seq,
            max(seq, 1), heads, *_strides(x, x if second is None else second, positions),
            BOTH=second is not None, **constants,
        )
    return made, made_y


def backward(
    grad_x: Tensor, grad_y: Tensor | None, x: Tensor, y: Tensor | None, positions: Tensor,
    theta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y (empty where there is none) and theta, which is summed in float32."""
    batch, seq, heads, width = x.shape
    x, second, theta = walkable(x), None if y is None else walkable(y), theta.contiguous()
    dx = x.new_empty(x.shape)
    dy = x.new_empty(0) if second is None else second.new_empty(second.shape)
    programs, constants = _constants(x)
    parts = torch.empty(programs, heads, width, dtype=torch.float32, device=x.device)
    with device_of(x):
        launch(
            lrpe_gradient_kernel, programs * heads, grad_x.contiguous(),
            None if grad_y is None else grad_y.contiguous(), x, second, positions, theta, dx, dy,
            parts, batch * seq, max(seq, 1), heads,
            *_strides(x, x if second is None else second, positions), BOTH=second is not None,
            **constants,
        )
    return dx, dy, parts.sum(0).to(theta.dtype)
