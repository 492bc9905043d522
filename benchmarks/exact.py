"""Linear attention with constant decay in float64 by the whole masked matrix: the truth to compare
with, written from the formula and independent of the package."""

from itertools import pairwise

import torch
from torch import Tensor


def _powers(log_decay: Tensor, steps: Tensor) -> Tensor:
    """exp(log_decay * steps) with 0 * -inf read as 0."""
    return torch.where(steps > 0, log_decay * steps.clamp(min=1), 0.0).exp()


def _one_head(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """q, k [batch, seq, key_dim], v [batch, seq, value_dim], state [batch, key_dim, value_dim]."""
    seq = q.shape[1]
    step = torch.arange(seq, dtype=torch.float64, device=q.device)
    distance = step[:, None] - step
    mask = torch.where(distance >= 0, _powers(log_decay, distance), 0.0)
    o = (q @ k.mT * mask) @ v + (q * _powers(log_decay, step + 1)[:, None]) @ state
    weighted = k * _powers(log_decay, seq - 1 - step)[:, None]
    total = _powers(log_decay, torch.full_like(log_decay, seq))
    return o, total * state + weighted.mT @ v


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None = None,
    bounds: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t, S_t = exp(log_decay) S_{t-1} + k_t v_t^T, and the final state, in float64.

    Args:
        q: [batch, seq, heads, key_dim], any dtype; gradients pass.
        k: [batch, seq, heads, key_dim].
        v: [batch, seq, heads, value_dim].
        log_decay: [heads], or None.
        initial_state: [batch, heads, key_dim, value_dim], with bounds [num_sequences, ...].
        bounds: of packed sequences, in a batch of 1.
    """
    q, k, v = q.double(), k.double(), v.double()
    heads = q.shape[2]
    decay = q.new_zeros(heads) if log_decay is None else log_decay.double()
    limits = [0, q.shape[1]] if bounds is None else bounds
    rows = q.shape[0] if bounds is None else len(bounds) - 1
    if initial_state is None:
        state = q.new_zeros(rows, heads, q.shape[3], v.shape[3])
    else:
        state = initial_state.double()
    outputs, states = [], []
    for i, (start, stop) in enumerate(pairwise(limits)):
        before = state if bounds is None else state[i : i + 1]
        q_, k_, v_ = (x[:, start:stop] for x in (q, k, v))
        parts = [
            _one_head(q_[:, :, h], k_[:, :, h], v_[:, :, h], decay[h], before[:, h])
            for h in range(heads)
        ]
        outputs.append(torch.stack([o for o, _ in parts], 2))
        states.append(torch.stack([after for _, after in parts], 1))
    return torch.cat(outputs, 1), torch.cat(states, 0)


def frobenius_error(actual: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of the truth, or over ``floor`` if that is larger.

    NaN and infinity count as infinity.
    """
    difference = (actual.double() - exact.double()).norm().item()
    if difference == 0.0:
        return 0.0
    scale = max(exact.double().norm().item(), floor)
    error = difference / scale if scale > 0 else float("inf")
    return error if error == error else float("inf")
