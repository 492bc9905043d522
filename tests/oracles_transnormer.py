"""Literal float64 forms of TransNormer's and FLASH's layers, token by token.

Sources: Qin et al. 2022 (arXiv:2210.10340), Hua et al. 2022 (arXiv:2202.10447), and the released
code of the TransNormer papers where it differs from the text.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, position: int, theta: Tensor) -> Tensor:
    """Channel i and channel i + dim / 2 as one complex number times exp(i position theta_i)."""
    first, second = x.double().chunk(2, -1)
    z = torch.complex(first, second) * torch.exp(1j * position * theta.double())
    return torch.cat([z.real, z.imag], -1)


def lrpe_rotary(x: Tensor, position: int, theta: Tensor, unit: Tensor) -> Tensor:
    """Rotation after the Householder reflection x - 2 v v^T x."""
    x, unit = x.double(), unit.double()
    return rotate(x - 2 * (x * unit).sum(-1, keepdim=True) * unit, position, theta)


def outer_srms(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x / (|x| / sqrt(d) + eps)."""
    return x / (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5 + eps)


def norm_attention(
    q: Tensor, k: Tensor, v: Tensor, phi: str, theta: Tensor, unit: Tensor, *, causal: bool
) -> Tensor:
    """o_t = sum_s (r_t phi(q_t)) . (r_s phi(k_s)) v_s, s <= t where causal, then SRMS of all heads.

    q, k, v are [seq, heads, dim]; the result is [seq, heads * dim].
    """
    q, k = (F.elu(x) + (phi == "1+elu") for x in (q, k))
    seq, heads, dim = q.shape
    o = torch.zeros(seq, heads, dim, dtype=torch.float64)
    for t in range(seq):
        for s in range(t + 1 if causal else seq):
            for h in range(heads):
                score = lrpe_rotary(q[t, h], t, theta, unit) @ lrpe_rotary(k[s, h], s, theta, unit)
                o[t, h] += score * v[s, h]
    return outer_srms(o.flatten(1))


def diag_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    weights: str,
    theta: Tensor,
    unit: Tensor,
    *,
    causal: bool,
) -> Tensor:
    """Attention of token t to the tokens of block t // block_size; [seq, heads * dim], no norm."""
    seq, heads, dim = q.shape
    o = torch.zeros(seq, heads, dim, dtype=torch.float64)
    for t in range(seq):
        start = t // block_size * block_size
        block = range(start, t + 1 if causal else min(start + block_size, seq))
        for h in range(heads):
            query = lrpe_rotary(q[t, h] / dim**0.5, t, theta, unit)
            logits = torch.stack([query @ lrpe_rotary(k[s, h], s, theta, unit) for s in block])
            p = logits.softmax(0) if weights == "softmax" else logits.relu()
            o[t, h] = sum(p[i] * v[s, h] for i, s in enumerate(block))
    return o.flatten(1)


def lrpe_grid(x: Tensor, place: tuple[int, ...], theta: Tensor, unit: Tensor) -> Tensor:
    """``lrpe_rotary`` of a token of a grid: pair p turns with axis p // n, frequency theta[p % n]."""
    x, unit = x.double(), unit.double()
    x = x - 2 * (x * unit).sum(-1, keepdim=True) * unit
    first, second = x.chunk(2, -1)
    pairs = range(first.shape[-1])
    angles = [place[p // theta.shape[0]] * theta[p % theta.shape[0]].double() for p in pairs]
    z = torch.complex(first, second) * torch.exp(1j * torch.stack(angles))
    return torch.cat([z.real, z.imag], -1)


def diag_attention_grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, ...],
    block_shape: tuple[int, ...],
    weights: str,
    theta: Tensor,
    unit: Tensor,
    real: Tensor,
) -> Tensor:
    """Attention of each real token to the real ones of its block; [seq, heads * dim], no norm."""
    places = list(itertools.product(*(range(extent) for extent in shape)))
    blocks = [tuple(s // b for s, b in zip(place, block_shape, strict=True)) for place in places]
    seq, heads, dim = q.shape
    o = torch.zeros(seq, heads, dim, dtype=torch.float64)
    for t, h in itertools.product(range(seq), range(heads)):
        block = [s for s in range(seq) if blocks[s] == blocks[t] and real[s]]
        if not real[t]:
            continue
        query = lrpe_grid(q[t, h] / dim**0.5, places[t], theta, unit)
        logits = [query @ lrpe_grid(k[s, h], places[s], theta, unit) for s in block]
        p = torch.stack(logits)
        p = p.softmax(0) if weights == "softmax" else p.relu()
        o[t, h] = sum(p[i] * v[s, h] for i, s in enumerate(block))
    return o.flatten(1)


def norm_attention_grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, ...],
    phi: str,
    theta: Tensor,
    unit: Tensor,
    real: Tensor,
) -> Tensor:
    """``norm_attention`` over the real tokens of a grid, both ways."""
    q, k = (F.elu(x) + (phi == "1+elu") for x in (q, k))
    places = list(itertools.product(*(range(extent) for extent in shape)))
    o = torch.zeros_like(v)
    for t, s, h in itertools.product(*(range(n) for n in (q.shape[0], *q.shape[:2]))):
        if real[s]:
            key = lrpe_grid(k[s, h], places[s], theta, unit)
            o[t, h] += (lrpe_grid(q[t, h], places[t], theta, unit) @ key) * v[s, h]
    return outer_srms(o.flatten(1))


def flash(
    z: Tensor,
    v: Tensor,
    scales: Tensor,
    offsets: Tensor,
    theta: Tensor,
    divisor: int,
    *,
    causal: bool,
    chunk_size: int | None = None,
    distance_bias: Tensor | None = None,
    rotary_bias: Tensor | None = None,
) -> Tensor:
    """A v of a gated attention unit, [seq, hidden_dim], before its gate and output projection.

    With chunk_size the linear form: relu^2 within a chunk, and between chunks products alone.
    """
    seq = z.shape[0]
    pairs = [
        [rotate(z[t] * scales[i] + offsets[i], t, theta) for t in range(seq)]
        for i in range(scales.shape[0])
    ]
    o = torch.zeros_like(v)
    for t in range(seq):
        for s in range(t + 1 if causal else seq):
            near = chunk_size is None or t // chunk_size == s // chunk_size
            if near:
                if chunk_size is None:
                    bias = rotate(rotary_bias[0], t, theta) @ rotate(rotary_bias[1], s, theta)
                else:
                    bias = distance_bias[t - s if causal else t - s + chunk_size - 1]
                o[t] += (pairs[0][t] @ pairs[1][s] / divisor + bias).relu() ** 2 * v[s]
            # Without an order the sum between chunks has the token's own chunk too, as released.
            if chunk_size is not None and not (near and causal):
                o[t] += pairs[2][t] @ pairs[3][s] / divisor * v[s]
    return o
