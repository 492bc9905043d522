"""Literal float64 forms of cosFormer, LightNet and the Toeplitz position encoding.

Layout ``[batch, seq, heads, dim]``. Sources: Qin et al. 2022 (arXiv:2202.08791), Qin et al. 2024
(arXiv:2405.21022).
"""

import math

import torch
from torch import Tensor


def cosformer(q: Tensor, k: Tensor, v: Tensor, most: int, *, causal: bool) -> Tensor:
    """sum_j w_ij v_j / max(sum_j w_ij, 1e-6), w_ij = relu(q_i).relu(k_j) cos(pi (i-j) / 2M)."""
    token = torch.arange(q.shape[1], dtype=torch.float64)
    distance = token[:, None] - token
    weights = torch.einsum("bthk,bshk->bhts", q.relu(), k.relu())
    weights = weights * (math.pi * distance / (2 * most)).cos()
    if causal:
        weights = weights * (distance >= 0)
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    return o / weights.sum(-1).clamp(min=1e-6).movedim(1, 2)[..., None]


def cumulative_softmax(k: Tensor, initial_mass: float = 0.0) -> Tensor:
    """exp(k_s) / (initial_mass + sum_{r <= t} exp(k_r)) for s <= t: [batch, t, s, heads, key_dim]."""
    seq = k.shape[1]
    rows = []
    for t in range(seq):
        weights = k[:, : t + 1].exp()
        weights = weights / (initial_mass + weights.sum(1, keepdim=True))
        rows.append(torch.cat([weights, torch.zeros_like(k[:, t + 1 :])], 1))
    return torch.stack(rows, 1)


def lightnet(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None = None, initial_mass: float = 0.0
) -> Tensor:
    """o_t = sum_{s <= t} q_t . (softmax weights of s at t) v_s, with LRPE as cos of differences.

    Args:
        angles: [seq, heads, key_dim] or None: weight (t, s) of a channel times cos(a_t - a_s).
    """
    weights = cumulative_softmax(k, initial_mass)
    if angles is not None:
        weights = weights * (angles[:, None] - angles[None]).cos()
    scores = torch.einsum("bthk,btshk->bhts", q, weights)
    return torch.einsum("bhts,bshv->bthv", scores, v)


def toeplitz(x: Tensor, mixing: Tensor, decays: Tensor, *, causal: bool) -> Tensor:
    """y_t = sum_s tau_|t-s| x_s per channel, tau_j[c] = sum_e B[c, e] lambda_e^j.

    Args:
        x: [batch, seq, channels].
        mixing: B, [channels, exponents].
        decays: lambda, [exponents].
        causal: s <= t alone.
    """
    token = torch.arange(x.shape[1])
    distance = token[:, None] - token
    tau = decays ** distance.abs()[..., None] @ mixing.T
    if causal:
        tau = torch.where(distance[..., None] >= 0, tau, 0.0)
    return torch.einsum("tsc,bsc->btc", tau, x)
