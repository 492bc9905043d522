"""Running log-sum-exp along seq with restarts: how much mass each key channel has seen.

The scan runs over all chunks at once, token by token inside them, then from chunk to chunk: about
2 sqrt(seq) steps, each on a wide tensor, and two passes over the data. Nothing is ever divided by
an exponential, so no range of x overflows, and -inf (no mass) is exact.
"""

import math

import torch
from torch import Tensor

from transnormer.ops.checks import no_autocast

# Stands for log 0 in differences, where -inf minus -inf would be NaN; exp of it is 0.
_EMPTY = -1e30


def _chunked(x: Tensor, chunk: int, fill: float) -> Tensor:
    """[batch, seq, channels] -> [batch, chunks, chunk, channels], filled up at the end."""
    missing = -x.shape[1] % chunk
    return torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill).unflatten(1, (-1, chunk))


def _barriers(starts: Tensor | None, seq: int, chunk: int, like: Tensor) -> Tensor:
    """-inf at tokens that nothing flows into, else 0: [1, chunks, chunk, 1]."""
    barrier = like.new_zeros(1, seq, 1)
    if starts is not None:
        barrier = barrier.masked_fill(starts[None, :, None], -math.inf)
    return _chunked(barrier, chunk, 0.0)


def _chunk_size(seq: int) -> int:
    return max(math.isqrt(max(seq - 1, 0)) + 1, 1)


@torch.library.custom_op("transnormer::logcumsumexp", mutates_args=())
def _logcumsumexp(x: Tensor, starts: Tensor | None) -> Tensor:
    seq = x.shape[1]
    # A float32 sum of z near 10 loses 5e-7 a token, which would drift over a text.
    flat, chunk = x.flatten(2).double(), _chunk_size(seq)
    barrier = _barriers(starts, seq, chunk, flat)
    y = _chunked(flat, chunk, -math.inf).contiguous()
    for c in range(1, chunk):
        y[:, :, c] = torch.logaddexp(y[:, :, c], y[:, :, c - 1] + barrier[:, :, c])
    entering = torch.empty_like(y[:, :, 0])
    carry = torch.full_like(entering[:, 0], -math.inf)
    opened = barrier.cummin(2).values
    for n in range(y.shape[1]):
        entering[:, n] = carry
        carry = torch.logaddexp(y[:, n, -1], carry + opened[:, n, -1])
    y = torch.logaddexp(y, entering[:, :, None] + opened)
    return y.flatten(1, 2)[:, :seq].to(x.dtype).reshape(x.shape)


@_logcumsumexp.register_fake
def _(x, starts):
    return x.new_empty(x.shape)


@torch.library.custom_op("transnormer::logcumsumexp_backward", mutates_args=())
def _logcumsumexp_backward(grad: Tensor, x: Tensor, y: Tensor, starts: Tensor | None) -> Tensor:
    """dx_s = exp(x_s - y_s) r_s, where r_s = dy_s + exp(y_s - y_{s+1}) r_{s+1} is scanned backward."""
    seq = x.shape[1]
    chunk = _chunk_size(seq)
    barrier = _barriers(starts, seq, chunk, y)
    floor = y.flatten(2).clamp(min=_EMPTY)
    weight = (x.flatten(2) - floor).exp().view(x.shape)
    # What fills up the last chunk has all mass, so that nothing comes back from it.
    total = _chunked(floor, chunk, -_EMPTY)
    r = _chunked(grad.flatten(2), chunk, 0.0).contiguous()
    with no_autocast(x.device.type):
        for c in reversed(range(chunk - 1)):
            factor = (total[:, :, c] - total[:, :, c + 1] + barrier[:, :, c + 1]).exp()
            r[:, :, c] += factor * r[:, :, c + 1]
        # Barriers between each token of a chunk and the first token of the next one.
        behind = barrier.flip(2).cummin(2).values.flip(2).roll(-1, 2)
        behind[:, :, -1] = 0.0
        behind[:, :-1] += barrier[:, 1:, :1]
        for n in reversed(range(r.shape[1] - 1)):
            factor = (total[:, n] - total[:, n + 1, :1] + behind[:, n]).exp()
            r[:, n] += factor * r[:, n + 1, :1]
    return weight * r.flatten(1, 2)[:, :seq].reshape(x.shape)


@_logcumsumexp_backward.register_fake
def _(grad, x, y, starts):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, starts = inputs
    ctx.save_for_backward(x, output, starts)


def _backward(ctx, grad):
    x, y, starts = ctx.saved_tensors
    return torch.ops.transnormer.logcumsumexp_backward(grad, x, y, starts), None


_logcumsumexp.register_autograd(_backward, setup_context=_setup_context)


def logcumsumexp(x: Tensor, starts: Tensor | None = None) -> Tensor:
    """y_t = log sum_{s <= t} exp(x_s) along dim 1; differentiable.

    Summed in float64 and rounded to x's dtype once.

    Args:
        x: [batch, seq, channels, ...], float32 or float64, finite or -inf. Where all mass so far is
            0, y is -inf and its gradient goes nowhere.
        starts: bool [seq], True at the first tokens of packed sequences: the sum begins anew there.

    Raises:
        TypeError: x in half precision, in which a running sum would be lost.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}; expected float32 or float64; convert it")
    return _logcumsumexp(x, starts)
