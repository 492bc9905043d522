"""Packed sequences and the opposite order, for the forms that have no way of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype

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


def from_first_to_last(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """Give a form that walks from the first token to the last both orders, and a state to begin with."""

    def both_orders(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        if initial_state is None:
            rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            shape = (rows, *k.shape[2:], v.shape[3])
            initial_state = torch.zeros(shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        if reverse:
            q, k, v = q.flip(1), k.flip(1), v.flip(1)
            if log_decay is not None and log_decay.dim() > 1:
                log_decay = log_decay.flip(1)
            if cu_seqlens is not None:
                # A packed row flipped whole has its sequences in the opposite order.
                cu_seqlens = cu_seqlens[-1] - cu_seqlens.flip(0)
                initial_state = initial_state.flip(0)
        o, final_state = run(
            q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
        if reverse:
            o = o.flip(1)
            final_state = final_state if cu_seqlens is None else final_state.flip(0)
        return o, final_state

    return both_orders
