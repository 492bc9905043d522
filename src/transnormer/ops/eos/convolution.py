"""eos with everything constant in time: a convolution, by FFT."""

import math

import torch
from torch import Tensor

from transnormer.ops.eos.call import Call, narrowed


def _powers(call: Call, count: int) -> Tensor:
    """o^1 .. o^count along the seq dim, [batch or 1, count, heads or 1, key or 1, value or 1]."""
    if call.o is not None:
        powers = call.o.to(call.state_dtype)
        while powers.shape[1] < count:
            powers = torch.cat([powers, powers * powers[:, -1:]], 1)
        return powers[:, :count]
    log_o = call.log_o
    if log_o is None:
        log_o = torch.zeros((1,) * 5, dtype=call.sum_dtype, device=call.i.device)
    steps = torch.arange(1, count + 1, device=call.i.device).view(1, -1, 1, 1, 1)
    size = ((log_o.real if log_o.is_complex() else log_o).to(call.sum_dtype) * steps).exp()
    if not log_o.is_complex():
        return size
    # float64, since a phase is a remainder of a number that grows with the sequence.
    turns = torch.remainder(log_o.imag.double() * steps, 2.0 * math.pi).to(call.sum_dtype)
    return torch.complex(size * turns.cos(), size * turns.sin())


def _diagonal_responses(call: Call, e: Tensor, s: Tensor, seq: int) -> tuple[Tensor, ...]:
    powers = _powers(call, seq)
    e, s = e[..., None], s[..., None]
    carried = powers[:, -1] * call.initial_state()
    expanded = torch.cat([torch.ones_like(powers[:, :1]), powers[:, :-1]], 1) * e
    return expanded, powers * s, carried


def _applied_powers(matrix: Tensor, x: Tensor, count: int) -> Tensor:
    """x, A x, A^2 x, ... along the seq dim, count of them, by doubling."""
    while x.shape[1] < count:
        x = torch.cat([x, matrix @ x], 1)
        matrix = matrix @ matrix
    return x[:, :count]


def _matrix_responses(call: Call, e: Tensor, s: Tensor, seq: int) -> tuple[Tensor, ...]:
    assert call.o is not None
    matrix = call.o.to(call.state_dtype)
    transposed = matrix.transpose(-1, -2)
    expanded = _applied_powers(matrix, e[..., None].to(matrix.dtype), seq)
    shrunk = _applied_powers(transposed, transposed @ s[..., None].to(matrix.dtype), seq)
    carried = torch.linalg.matrix_power(matrix[:, 0], seq) @ call.initial_state()
    return expanded, shrunk, carried


def _causal_convolution(kernel: Tensor, x: Tensor) -> Tensor:
    """sum_{j <= t} kernel_j x_{t-j} along dim 1; the other dims broadcast."""
    seq = x.shape[1]
    length = 1 << (2 * seq - 1).bit_length()
    spectrum = torch.fft.rfft(kernel, length, dim=1) * torch.fft.rfft(x, length, dim=1)
    return torch.fft.irfft(spectrum, length, dim=1)[:, :seq]


def convolution(call: Call) -> tuple[Tensor, Tensor]:
    """y = K * i with K_j = Re(s^T o^j e), the state's part added; O(seq log seq).

    The kernel costs seq x heads x key_dim (x value_dim where o varies along it), without batch.
    An FFT rounds relative to the largest value of a row: errors are eps of that, not of each entry,
    and a later token shows in earlier outputs at that size.
    """
    seq = call.i.shape[1]
    i, e, s = (call.widened(x) for x in (call.i, call.e[:, :1], call.s[:, :1]))
    e, s = narrowed(e), narrowed(s)
    constant = call._replace(
        o=None if call.o is None else call.o[:, :1],
        log_o=None if call.log_o is None else call.log_o[:, :1],
    )
    responses = _matrix_responses if call.psi == "matmul" else _diagonal_responses
    expanded, shrunk, memory = responses(constant, e, s, seq)
    kernel = (expanded * s[..., None]).sum(-2)
    if i.is_complex():
        y = _causal_convolution(kernel.real, i.real) - _causal_convolution(kernel.imag, i.imag)
    else:
        y = _causal_convolution(kernel.real if kernel.is_complex() else kernel, i)
    if call.state is not None:
        of_state = torch.einsum("bthkv,bhkv->bthv", shrunk, call.state)
        y = y + (of_state.real if of_state.is_complex() else of_state)
    backward = expanded.flip(1).expand(-1, -1, -1, -1, expanded.shape[4])
    added = torch.einsum("bthkv,bthv->bhkv", backward, i.to(call.state_dtype))
    return y.to(call.output_dtype), memory + added
