"""Packed sequences one after the other, for the forms that have no way of their own."""

from collections.abc import Callable

import torch
from torch import Tensor

# (q, k, v, log_decay, state) of whole sequences along the batch -> (o, final state).
Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def over_sequences(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run once where cu_seqlens is None, else once a packed sequence; empty ones pass their state.

    Args:
        run: the form.
        q, k, v: [batch, seq, ...].
        log_decay: of rank 1, or [batch, seq, ...].
        initial_state: [batch or num_sequences, ...].
        cu_seqlens: [num_sequences + 1] or None.
    """
    if cu_seqlens is None:
        return run(q, k, v, log_decay, initial_state)
    outputs, states, bounds = [], [], cu_seqlens.tolist()
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        state = initial_state[i : i + 1]
        if stop > start:
            part = slice(start, stop)
            decay = log_decay if log_decay.dim() == 1 else log_decay[:, part]
            o, state = run(q[:, part], k[:, part], v[:, part], decay, state)
            outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)
