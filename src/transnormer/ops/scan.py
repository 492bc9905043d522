"""The first-order recurrence of vectors, h_t = a_t h_{t-1} + x_t with complex a, as a scan."""

from typing import Any

import torch
from torch import Tensor

from transnormer.ops import checks, kernel_ops
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.kernel_ops import Form, Request, needs_triton


@torch.library.custom_op("transnormer::complex_scan", mutates_args=())
def _scan(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t from h_{-1} = 0; all [batch, seq, width, 2] of real, imaginary."""
    # Before a round of shift n, h_t sums the last n tokens and factor_t is the product of their a.
    # Only products of the given factors occur, so that nothing overflows and a = 0 is like any
    # other value; a quotient of cumulative products would lose both.
    factor = torch.view_as_complex(a.contiguous()).clone()
    h = torch.view_as_complex(x.contiguous()).clone()
    shift, seq = 1, x.shape[1]
    while shift < seq:
        h[:, shift:] = torch.addcmul(h[:, shift:], factor[:, shift:], h[:, :-shift])
        if 2 * shift < seq:
            factor[:, shift:] = factor[:, shift:] * factor[:, :-shift]
        shift *= 2
    return torch.view_as_real(h)


@_scan.register_fake
def _(a, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output)


def _conjugate_product(x: Tensor, y: Tensor) -> Tensor:
    """x conj(y) of pairs."""
    real = x[..., 0] * y[..., 0] + x[..., 1] * y[..., 1]
    imaginary = x[..., 1] * y[..., 0] - x[..., 0] * y[..., 1]
    return torch.stack([real, imaginary], -1)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    # g_t = dh_t + conj(a_{t+1}) g_{t+1}: the same recurrence from the last token; dx_t = g_t and
    # da_t = g_t conj(h_{t-1}).
    a, h = ctx.saved_tensors
    conjugate = torch.stack([a[..., 0], -a[..., 1]], -1)
    following = torch.cat([conjugate[:, 1:], torch.zeros_like(a[:, :1])], 1)
    grad_x = torch.ops.transnormer.complex_scan(following.flip(1), grad.flip(1)).flip(1)
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
    return _conjugate_product(grad_x, before), grad_x


_scan.register_autograd(_backward, setup_context=_setup_context)


def _fake(a, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad, a, h):
    return torch.empty_like(h), torch.empty_like(h)


def _kernel_gradients(ctx, grad):
    return _backward_op(grad, *ctx.saved_tensors)


_op, _backward_op = kernel_ops.define(
    "complex_scan_kernel",
    "transnormer.ops.triton_scan",
    Form("(Tensor a, Tensor x) -> Tensor", _fake),
    Form("(Tensor grad, Tensor a, Tensor h) -> (Tensor, Tensor)", _fake_backward),
    _setup_context,
    _kernel_gradients,
)

# The first automatic row that does not refuse runs.
IMPLEMENTATIONS = (
    Implementation("triton", needs_triton, _op),
    Implementation("torch", lambda _: None, _scan),
)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y of pairs."""
    real = x[..., 0] * y[..., 0] - x[..., 1] * y[..., 1]
    imaginary = x[..., 0] * y[..., 1] + x[..., 1] * y[..., 0]
    return torch.stack([real, imaginary], -1)


def complex_scan(
    a: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + x_t, elementwise, with complex numbers as pairs of reals.

    "torch" is a doubling (Hillis and Steele) scan of log2(seq) passes, "triton" (float32 on a GPU)
    reads everything twice in three launches. Neither has exponentials or quotients, so any |a| <= 1
    is safe, 0 too. Differentiable in a, x and initial_state; the gradient is another such scan.
    Packed sequences cost nothing more: a is 0 at their first tokens. Everything has the inputs'
    dtype, float32 or float64.

    Args:
        a: factors, [batch, seq, width, 2], last dim real and imaginary part.
        x: inputs, [batch, seq, width, 2].
        initial_state: h before the first token, [batch or num_sequences, width, 2]; None is 0.
        cu_seqlens: int32 or int64 [num_sequences + 1], batch is then 1; empty sequences pass their
            state through.
        implementation: "auto", "triton" or "torch".

    Returns:
        h, [batch, seq, width, 2], and the state after the last token, shaped as initial_state.

    Raises:
        ValueError: shapes, an unknown implementation.
        TypeError: dtypes, or what is no tensor.
        NotImplementedError, RuntimeError: the named implementation cannot run this call.
    """
    for name, tensor, optional in (
        ("a", a, False),
        ("x", x, False),
        ("initial_state", initial_state, True),
        ("cu_seqlens", cu_seqlens, True),
    ):
        checks.check_tensor(name, tensor, optional=optional)
    checks.check_rank("x", x, "batch seq width 2")
    checks.check_shape("x", x, (*x.shape[:-1], 2), "batch seq width 2")
    checks.check_shape("a", a, x.shape, "batch seq width 2")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}; expected float32 or float64; convert it")
    checks.check_same("a", a, x.dtype, x.device, "x")
    batch, seq = x.shape[:2]
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, batch, seq, x.device)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = x.new_zeros(rows, *x.shape[2:])
    shape = (rows, *x.shape[2:])
    checks.check_shape("initial_state", initial_state, shape, "rows width 2")
    checks.check_same("initial_state", initial_state, x.dtype, x.device, "x")
    request = Request(x.device, x.dtype, named=implementation == "triton")
    chosen: Any = choose("complex_scan", IMPLEMENTATIONS, request, implementation)
    if seq == 0:
        return x + a, initial_state
    if cu_seqlens is None:
        first = x[:, :1] + _product(a[:, :1], initial_state[:, None])
        h = first if seq == 1 else chosen.run(a, torch.cat([first, x[:, 1:]], 1))
        # A copy: a view would keep the whole of h in memory as long as the state.
        return h, h[:, -1].clone()
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    filled = (stops > starts)[:, None, None]
    # One slot more than tokens: where an empty sequence at the end would start.
    entering = torch.zeros(seq + 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    entering = entering.index_add(0, starts, initial_state * filled)[None, :seq]
    begins = torch.zeros(seq + 1, dtype=torch.bool, device=x.device)
    begins = begins.index_fill(0, starts, True)[None, :seq, None, None]
    h = chosen.run(a.masked_fill(begins, 0.0), x + _product(a, entering))
    return h, torch.where(filled, h[0, (stops - 1).clamp(min=0)], initial_state)
