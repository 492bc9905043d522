"""The models behind the rows of eos, each by its own equation in float64, without eos.

All take and return [batch, seq, heads, dim] unless they say otherwise. Sums over pairs of tokens,
kernels by powers, or the model's recurrence with real numbers: whichever is farthest from the row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pairs(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """sum_{s <= t} sum_j q_tj k_sj weight_tsj v_s; weight broadcasts to [b, t, s, h, key]."""
    seq = q.shape[1]
    past = torch.ones(seq, seq, dtype=torch.bool).tril()[None, :, :, None, None]
    weight = torch.where(past, weight, 0.0).expand(q.shape[0], seq, seq, *q.shape[2:])
    return torch.einsum("bthj,bshj,btshj,bshv->bthv", q, k, weight, v)


def distances(seq: int) -> Tensor:
    """t - s, [1, t, s, 1, 1]; 0 above the diagonal."""
    steps = torch.arange(seq, dtype=torch.float64)
    return (steps[:, None] - steps).clamp(min=0)[None, :, :, None, None]


def products(factor: Tensor) -> Tensor:
    """Product of factors of tokens s + 1 .. t for every pair, [b, seq, ...] -> [b, t, s, ...]."""
    seq, columns = factor.shape[1], []
    for s in range(seq):
        column, running = [torch.zeros_like(factor[:, 0])] * s, torch.ones_like(factor[:, 0])
        for t in range(s, seq):
            running = running * factor[:, t] if t > s else running
            column.append(running)
        columns.append(torch.stack(column, 1))
    return torch.stack(columns, 2)


def rotated(x: Tensor, theta: Tensor) -> Tensor:
    """Each pair (2j, 2j + 1) of channels turned by t theta_j, by sines and cosines."""
    t = torch.arange(x.shape[1], dtype=torch.float64)
    angle = t[:, None, None] * theta
    first, second = x[..., 0::2], x[..., 1::2]
    turned = (
        first * angle.cos() - second * angle.sin(),
        first * angle.sin() + second * angle.cos(),
    )
    return torch.stack(turned, -1).flatten(-2)


def retention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, theta: Tensor) -> Tensor:
    """(Q K^T * D) V with rotated q and k and D_ts = gamma^(t - s)."""
    weight = (log_decay[:, None] * distances(q.shape[1])).exp()
    return pairs(rotated(q, theta), rotated(k, theta), v, weight)


def lrpe(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """Scores sum_j q_j k_j cos((t - s) theta_j), decayed by distance."""
    apart = distances(q.shape[1])
    weight = (apart * theta).cos()
    if log_decay is not None:
        weight = weight * (log_decay[:, None] * apart).exp()
    return pairs(q, k, v, weight)


def cosformer(q: Tensor, k: Tensor, v: Tensor, max_length: int) -> Tensor:
    """Re-weighted linear attention with its denominator."""
    weight = (distances(q.shape[1]) * (math.pi / (2 * max_length))).cos()
    q, k = q.relu(), k.relu()
    total = pairs(q, k, torch.ones_like(v[..., :1]), weight)
    return pairs(q, k, v, weight) / total.clamp(min=1e-6)


def gateloop(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, phase: Tensor) -> Tensor:
    """Products of gates, cosine of the phases between."""
    turns = phase.cumsum(1)
    weight = products(log_gate.exp()) * (turns[:, :, None] - turns[:, None]).cos()
    return pairs(q, k, v, weight)


def outer_gate(q: Tensor, k: Tensor, v: Tensor, key_gate: Tensor, value_gate: Tensor) -> Tensor:
    """sum_s (q_t * prod alpha * k_s) (prod beta * v_s)."""
    keys, values = products(key_gate.exp()), products(value_gate.exp())
    return torch.einsum("bthj,bshj,btshj,btshv,bshv->bthv", q, k, keys, values, v)


def hgrn1(c: Tensor, log_forget: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of h, as two real recurrences."""
    f = log_forget.exp()
    real, imag = torch.zeros_like(f[:, 0]), torch.zeros_like(f[:, 0])
    outputs = []
    for t in range(c.shape[1]):
        turned = (
            real * theta.cos() - imag * theta.sin(),
            real * theta.sin() + imag * theta.cos(),
        )
        real = f[:, t] * turned[0] + (1 - f[:, t]) * c[:, t].real
        imag = f[:, t] * turned[1] + (1 - f[:, t]) * c[:, t].imag
        outputs.append((real, imag))
    return torch.stack([r for r, _ in outputs], 1), torch.stack([m for _, m in outputs], 1)


def lightnet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over the past for every token and key channel, one prefix after the other."""
    outputs = []
    for t in range(k.shape[1]):
        weights = torch.softmax(k[:, : t + 1], 1)
        outputs.append(torch.einsum("bhj,bshj,bshv->bhv", q[:, t], weights, v[:, : t + 1]))
    return torch.stack(outputs, 1)


def deltanet(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """Fast weights: read the key's old value, write the difference."""
    k = k / k.norm(dim=-1, keepdim=True)
    memory = q.new_zeros(q.shape[0], q.shape[2], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        old = torch.einsum("bhj,bhjv->bhv", k[:, t], memory)
        change = beta[:, t, :, None] * (v[:, t] - old)
        memory = memory + torch.einsum("bhj,bhv->bhjv", k[:, t], change)
        outputs.append(torch.einsum("bhj,bhjv->bhv", q[:, t], memory))
    return torch.stack(outputs, 1)


def mamba(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """sum_{s <= t} C_tk exp(A_kv sum of steps s + 1 .. t) B_sk delta_s u_s."""
    steps = delta.cumsum(1)
    between = steps[:, :, None] - steps[:, None]
    seq = u.shape[1]
    past = torch.ones(seq, seq, dtype=torch.bool).tril()[None, :, :, None, None, None]
    decay = torch.where(past, (between[..., None, :] * a).exp(), 0.0)
    return torch.einsum("bthk,bshk,btshkv,bshv->bthv", c, b, decay, delta * u)


def convolve(kernel: Tensor, x: Tensor) -> Tensor:
    """y_t = sum_{j <= t} kernel_j x_{t - j}; kernel [seq, channels], x [batch, seq, channels]."""
    outputs = []
    for t in range(x.shape[1]):
        outputs.append(sum(kernel[j] * x[:, t - j] for j in range(t + 1)))
    return torch.stack(outputs, 1)


def s4d(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The kernel of zero-order hold, term by term."""
    kernel = []
    for j in range(u.shape[1]):
        pole = (delta[:, None] * a).exp()
        kernel.append(2 * (c * b * (pole - 1) / a * pole**j).sum(-1).real)
    return convolve(torch.stack(kernel), u)


def s4(
    u: Tensor, delta: Tensor, diagonal: Tensor, p: Tensor, q: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    """The trapezoid rule step by step: x' - x = delta/2 A (x' + x) + delta B u', solved for x'."""
    channels, poles = b.shape
    outputs = []
    for h in range(channels):
        a = torch.diag(diagonal[h]) - torch.outer(p[h], q[h].conj())
        left = torch.eye(poles, dtype=b.dtype) - delta[h] / 2 * a
        x = u.new_zeros(u.shape[0], poles).to(b.dtype)
        row = []
        for t in range(u.shape[1]):
            right = x + delta[h] / 2 * (x @ a.T) + delta[h] * b[h] * u[:, t, h, None]
            x = torch.linalg.inv(left).matmul(right.unsqueeze(-1))[..., 0]
            row.append((x @ c[h]).real)
        outputs.append(torch.stack(row, 1))
    return torch.stack(outputs, -1)


def s5(u: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """x_t = A x_{t-1} + B u_t, y_t = Re(C x_t); a dense."""
    x = torch.zeros(u.shape[0], b.shape[0], dtype=b.dtype)
    outputs = []
    for t in range(u.shape[1]):
        x = x @ a.T + u[:, t].to(b.dtype) @ b.T
        outputs.append((x @ c.T).real)
    return torch.stack(outputs, 1)


def rwkv4(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """The weighted average, token by token over all earlier ones."""
    outputs = []
    for t in range(k.shape[1]):
        logits = [k[:, s] - (t - 1 - s) * decay for s in range(t)] + [bonus + k[:, t]]
        weights = torch.softmax(torch.stack(logits, 1), 1)
        outputs.append((weights * v[:, : t + 1]).sum(1))
    return torch.stack(outputs, 1)


def toeplitz(x: Tensor, coefficients: Tensor) -> Tensor:
    """The lower Toeplitz matrix of c times x; lags beyond the kernel have weight 0."""
    seq, size = x.shape[1], coefficients.shape[1]
    c = F.pad(coefficients, (0, max(seq - size, 0)))
    lag = torch.arange(seq)[:, None] - torch.arange(seq)
    matrix = torch.where(lag >= 0, c[:, lag.clamp(min=0)], 0.0)
    return torch.einsum("hts,bshv->bthv", matrix, x)


def eos_gradients(
    i: Tensor, e: Tensor, s: Tensor, o: Tensor, dy: Tensor, d_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """di, de, ds, do of psi "diag" with real o of full size, by the reversed recurrence.

    dm_t = o_{t+1} dm_{t+1} + s_t dy_t^T; ds_t = m_t dy_t; de_t = dm_t i_t; di_t = dm_t^T e_t;
    do_t = dm_t * m_{t-1}. d_last is the gradient of the last memory.
    """
    seq, memories = i.shape[1], [torch.zeros_like(o[:, 0])]
    for t in range(seq):
        memories.append(o[:, t] * memories[-1] + e[:, t, :, :, None] * i[:, t, :, None])
    rows, dm = [], d_last
    for t in reversed(range(seq)):
        dm = dm + s[:, t, :, :, None] * dy[:, t, :, None]
        rows.append(
            (
                torch.einsum("bhkv,bhk->bhv", dm, e[:, t]),
                torch.einsum("bhkv,bhv->bhk", dm, i[:, t]),
                torch.einsum("bhkv,bhv->bhk", memories[t + 1], dy[:, t]),
                dm * memories[t],
            )
        )
        dm = o[:, t] * dm
    di, de, ds, do = (torch.stack(x[::-1], 1) for x in zip(*rows))
    return di, de, ds, do
