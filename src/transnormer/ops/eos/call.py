"""One call of eos in the form that its implementations read, and what is constant in it."""

from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype

COMPLEX_OF = {torch.float32: torch.complex64, torch.float64: torch.complex128}
REAL_OF = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class Call(NamedTuple):
    """Checked arguments.

    Attributes:
        i: [batch, seq, heads, value_dim], real or complex.
        e, s: [batch or 1, seq or 1, heads or 1, key_dim], real or complex.
        o: rank 5 or None.
        log_o: rank 5 with real part <= 0, or None; o and log_o both None is o = 1.
        psi: "diag" or "matmul".
        state: [batch, heads, key_dim, value_dim] or None for zeros.
        is_complex: whether the state is.
    """

    i: Tensor
    e: Tensor
    s: Tensor
    o: Tensor | None
    log_o: Tensor | None
    psi: str
    state: Tensor | None
    is_complex: bool

    @property
    def sum_dtype(self) -> torch.dtype:
        """The real dtype of sums: float32, or float64 for float64 inputs."""
        return accumulation_dtype(REAL_OF.get(self.i.dtype, self.i.dtype))

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the state."""
        return COMPLEX_OF[self.sum_dtype] if self.is_complex else self.sum_dtype

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of y: i's, without its imaginary part."""
        return REAL_OF.get(self.i.dtype, self.i.dtype)

    def widened(self, x: Tensor) -> Tensor:
        """x in the dtype of sums; complex where it is complex."""
        return x.to(COMPLEX_OF[self.sum_dtype] if x.is_complex() else self.sum_dtype)

    def initial_state(self) -> Tensor:
        """The state before the first token, zeros where none was given."""
        if self.state is not None:
            return self.state
        shape = (self.i.shape[0], self.i.shape[2], self.e.shape[3], self.i.shape[3])
        return torch.zeros(shape, dtype=self.state_dtype, device=self.i.device)


def varies(x: Tensor, dim: int) -> bool:
    """Whether x has entries of its own along dim; an expanded dim (stride 0) has not.

    Told by shape and stride: comparing values would wait for the device.
    """
    return x.shape[dim] > 1 and x.stride(dim) != 0


def narrowed(x: Tensor) -> Tensor:
    """x with every dim along which it does not vary cut to size 1."""
    for dim in range(x.dim()):
        if x.shape[dim] > 1 and not varies(x, dim):
            x = x.narrow(dim, 0, 1)
    return x
