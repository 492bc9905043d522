"""Plain forms of linear attention, written to be read: the token recurrence and the masked matrix.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

(Qin et al. 2023, arXiv:2307.14995, section 3.4.) Both run on any device, in float32 (float64 for
float64 inputs), differentiable by autograd. They are slow: a step of Python a token, or a matrix of
seq x seq. ``origin_recurrence`` is the authors' first inference form, kept to show how it fails.

Legend: B batch, T seq, H kv heads, G query heads a kv head, K key dim, V value dim.
"""

import torch
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.linear_attention.sequences import over_sequences


def _grouped(q: Tensor, kv_heads: int, scale: float) -> Tensor:
    """[B, T, heads, K] -> [B, T, H, G, K] in the accumulation dtype, scaled."""
    return q.to(accumulation_dtype(q.dtype)).unflatten(2, (kv_heads, -1)) * scale


def _expanded_log_decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Any form of log_decay as [B or 1, T or 1, H, 1 or K] in the accumulation dtype."""
    if log_decay.dim() == 1:
        return log_decay.to(dtype).view(1, 1, -1, 1)
    return log_decay.to(dtype) if log_decay.dim() == 4 else log_decay.to(dtype)[..., None]


def _or_zeros(log_decay: Tensor | None, k: Tensor) -> Tensor:
    """None as a constant log decay of 0."""
    return k.new_zeros(k.shape[2]) if log_decay is None else log_decay


def _decay(log_decay: Tensor) -> Tensor:
    """exp with a gradient of 0 (not NaN) at -inf."""
    return torch.where(log_decay == -torch.inf, 0.0, log_decay).exp() * (log_decay != -torch.inf)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass over inputs of the accumulation dtype; q is [B, T, H, G, K]."""
    g = _expanded_log_decay(log_decay, k.dtype)
    # Near 1 a float32 decay is off the same way at every token; expm1 rounds without direction.
    near = g > -0.5
    kept = near.to(g.dtype).expand(-1, k.shape[1], -1, -1)
    rest = torch.where(near, g.clamp(min=-0.5).expm1(), _decay(g)).expand(-1, k.shape[1], -1, -1)
    outputs = []
    for t in range(k.shape[1]):
        added = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = kept[:, t, :, :, None] * state + (rest[:, t, :, :, None] * state + added)
        outputs.append(q[:, t] @ state)
    return torch.stack(outputs, 1), state


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token; arguments and results as ``linear_attention``'s."""
    dtype = accumulation_dtype(q.dtype)
    o, state = over_sequences(
        _recurrence,
        _grouped(q, k.shape[2], scale),
        k.to(dtype),
        v.to(dtype),
        _or_zeros(log_decay, k),
        initial_state,
        cu_seqlens,
    )
    return o.flatten(2, 3).to(q.dtype), state


def pairwise_log_decay(log_decay: Tensor) -> Tensor:
    """Sum of log_decay over s+1 .. t for every pair, [B, T, H, K] -> [B, T, T, H, K]; -inf above.

    Sums, not differences of cumulative sums: -inf stays legal and strong decay loses no digits.
    """
    seq = log_decay.shape[1]
    steps = torch.arange(seq, device=log_decay.device)
    below = (steps[:, None] > steps).view(1, seq, seq, 1, 1)
    sums = torch.where(below, log_decay[:, :, None], 0.0).cumsum(1)
    return torch.where((steps[:, None] >= steps).view(1, seq, seq, 1, 1), sums, -torch.inf)


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """The masked matrix form O = (Q K^T * M) V, [batch, seq, heads, value_dim]; no states.

    Time and memory grow with seq^2 (seq^2 * key_dim for key-wise decay).
    """
    dtype = accumulation_dtype(q.dtype)
    q_ = _grouped(q, k.shape[2], scale)
    g = _expanded_log_decay(_or_zeros(log_decay, k), dtype).expand(-1, k.shape[1], -1, -1)
    weights = _decay(pairwise_log_decay(g))
    if weights.shape[-1] == 1:
        scores = torch.einsum("bthgk,bshk->bhgts", q_, k.to(dtype))
        scores = scores * weights[..., 0].permute(0, 3, 1, 2)[:, :, None]
    else:
        scores = torch.einsum("bthgk,bshk,btshk->bhgts", q_, k.to(dtype), weights)
    return torch.einsum("bhgts,bshv->bthgv", scores, v.to(dtype)).flatten(2, 3).to(q.dtype)


def origin_recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The authors' first inference form, which overflows; never used by the package.

    It splits decay^(t - s) into decay^t on the query and decay^-s on the key (Qin et al. 2023,
    arXiv:2307.14995, section 3.4.1), so kv_t = kv_{t-1} + decay^-t k_t v_t^T grows without bound: in
    float32 decay^-t is infinite once -log_decay * t > 88.7 (slope 0.5: t >= 178), and infinity
    times the vanished query factor is NaN. ``recurrence`` is the same sum with factors at most 1.

    Args:
        q: queries, [batch, seq, heads, key_dim]; k, v as many heads.
        log_decay: [heads]; its arithmetic is done in the dtype of q.
    """
    state = q.new_zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        growth = (-log_decay.to(q.dtype) * (t + 1)).exp().view(1, -1, 1)
        state = state + (growth * k[:, t])[..., None] * v[:, t, :, None, :]
        shrink = (log_decay.to(q.dtype) * (t + 1)).exp().view(1, -1, 1)
        outputs.append(((shrink * q[:, t])[:, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, 1)
