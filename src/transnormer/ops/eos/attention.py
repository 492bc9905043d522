"""eos by the kernels of linear attention: real decays as they are, complex ones by doubled keys."""

import math

import torch
from torch import Tensor

from transnormer.ops.eos.call import Call, varies
from transnormer.ops.linear_attention import linear_attention, linear_attention_step


def _log_decay(log_o: Tensor, batch: int, seq: int, heads: int, key_dim: int) -> Tensor:
    """[.., .., .., .., 1] broadcastable -> the leanest of [heads], [b, s, h] and [b, s, h, key]."""
    g = log_o[..., 0]
    if varies(g, 3):
        return g.expand(batch, seq, heads, key_dim)
    g = g[..., 0]
    if varies(g, 0) or varies(g, 1):
        return g.expand(batch, seq, heads)
    return g[0, 0].expand(heads)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if v.shape[1] == 1 and state is not None:
        return linear_attention_step(q, k, v, log_decay, state)
    return linear_attention(q, k, v, log_decay, initial_state=state)


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """Real decays that do not vary along value_dim: q = s, k = e, v = i, log_decay = log_o."""
    batch, seq, heads, _ = call.i.shape
    keys = call.e.shape[3]
    e, s = (x.expand(batch, seq, heads, keys) for x in (call.e, call.s))
    log_decay = call.log_o
    if log_decay is not None:
        log_decay = _log_decay(log_decay.to(call.sum_dtype), batch, seq, heads, keys)
    return _attend(s, e, call.i, log_decay, call.state)


def _angles(theta: Tensor, seq: int, dtype: torch.dtype) -> Tensor:
    """theta_1 + ... + theta_t for t = 1 .. seq, mod 2 pi, [batch or 1, seq, heads or 1, key or 1].

    Summed in float64: a phase is a remainder of a number that grows with the sequence.
    """
    wide = theta.double()
    if varies(wide, 1):
        sums = wide.cumsum(1)
    else:
        steps = torch.arange(1, seq + 1, dtype=torch.float64, device=theta.device)
        sums = steps.view(1, -1, 1, 1) * wide[:, :1]
    return torch.remainder(sums, 2.0 * math.pi).to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of x (cos + i sin)."""
    if not x.is_complex():
        return x * cos, x * sin
    return x.real * cos - x.imag * sin, x.real * sin + x.imag * cos


def _real_inputs(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """i, e, s, log_o and state with a real i: e (a + i b)^T = e a^T + (i e) b^T, as two heads each."""
    i, e, s, log_o, state = (
        call.i,
        call.widened(call.e),
        call.widened(call.s),
        call.log_o,
        call.state,
    )
    assert log_o is not None
    if i.is_complex():
        heads = i.shape[2]
        e, s, log_o = (x.expand(*x.shape[:2], heads, *x.shape[3:]) for x in (e, s, log_o))
        e, s, log_o = torch.cat([e, 1j * e], 2), torch.cat([s, s], 2), torch.cat([log_o, log_o], 2)
        i = torch.cat([i.real, i.imag], 2)
        state = None if state is None else torch.cat([state, torch.zeros_like(state)], 1)
    return i, e, s, log_o, state


def doubled(call: Call) -> tuple[Tensor, Tensor]:
    """Complex decays that do not vary along value_dim, as real attention over 2 key_dim channels.

    With T_t the sum of phases up to token t of the call, n_t = exp(-i T_t) m_t obeys a real decay:

        n_t = exp(Re log_o_t) n_{t-1} + (exp(-i T_t) e_t) i_t^T      y_t = Re(n_t^T exp(i T_t) s_t)

    so Re n and Im n are the two halves of a real state, n_0 = m_0 continues any complex state and
    m_N = exp(i T_N) n_N is handed back. All factors have modulus 1: nothing overflows.
    """
    i, e, s, log_o, state = _real_inputs(call)
    batch, seq, heads, _ = i.shape
    keys = e.shape[3]
    angles = _angles(log_o.imag[..., 0], seq, call.sum_dtype)
    cos, sin = angles.cos(), angles.sin()
    shape = (batch, seq, heads, keys)
    k = torch.cat([x.expand(shape) for x in _turned(e, cos, -sin)], -1)
    real, imag = _turned(s, cos, sin)
    q = torch.cat([real.expand(shape), -imag.expand(shape)], -1)
    log_decay = _log_decay(log_o.real.to(call.sum_dtype), batch, seq, heads, keys)
    if log_decay.dim() == 4:
        log_decay = torch.cat([log_decay, log_decay], -1)
    if state is not None:
        state = torch.cat([state.real, state.imag], 2)
    y, state = _attend(q.to(i.dtype), k.to(i.dtype), i, log_decay, state)
    last = torch.complex(cos[:, -1], sin[:, -1])[..., None]
    memory = last * torch.complex(state[:, :, :keys], state[:, :, keys:])
    if call.i.is_complex():
        half = heads // 2
        y, memory = y[:, :, :half] + y[:, :, half:], memory[:, :half] + memory[:, half:]
    return y, memory
