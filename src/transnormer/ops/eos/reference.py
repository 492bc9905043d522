"""The recurrence of eos token by token, written to be read."""

import torch
from torch import Tensor

from transnormer.ops.eos.call import Call


def factors(call: Call, start: int, stop: int) -> Tensor | None:
    """o of tokens start .. stop - 1 in the state's dtype, seq dim 1 where constant; None for o = 1."""
    x = call.o if call.o is not None else call.log_o
    if x is None:
        return None
    part = (x[:, start:stop] if x.shape[1] > 1 else x).to(call.state_dtype)
    return part.exp() if call.o is None else part


def token(x: Tensor, t: int) -> Tensor:
    """x[:, t], or the one entry of a constant."""
    return x[:, t if x.shape[1] > 1 else 0]


def recurrence(call: Call) -> tuple[Tensor, Tensor]:
    """m_t = psi(o_t, m_{t-1}) + e_t i_t^T, y_t = Re(m_t^T s_t): a step of Python a token."""
    i, e, s = (call.widened(x) for x in (call.i, call.e, call.s))
    memory, outputs = call.initial_state(), []
    for t in range(i.shape[1]):
        o = factors(call, t, t + 1)
        if o is not None:
            memory = o[:, 0] @ memory if call.psi == "matmul" else o[:, 0] * memory
        memory = memory + token(e, t)[..., :, None] * i[:, t, :, None, :]
        outputs.append((token(s, t)[..., :, None] * memory).sum(-2))
    y = torch.stack(outputs, 1)
    return (y.real if y.is_complex() else y).to(call.output_dtype), memory
