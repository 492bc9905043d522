"""Launching kernels: on the inputs' device, on its current stream."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Entries of a state that one program of a carry kernel hands on.
CARRY_BLOCK = 1024


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU the current one, where a kernel launches, if it is not."""
    if x.is_cuda:
        if x.device.index != torch.cuda.current_device():
            return torch.cuda.device(x.device)
    elif not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"the inputs are on {x.device}; expected a CUDA device for a Triton kernel, or "
            "Triton's interpreter; move them"
        )
    return nullcontext()


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The constants of a kernel that say how products of a dtype are computed."""
    interpreted, exact = triton.knobs.runtime.interpret, dtype == torch.float32
    # The interpreter computes with the bits of a bfloat16 as if they were an integer's.
    operands = tl.float32 if interpreted and dtype == torch.bfloat16 else _DTYPES[dtype]
    precision = "tf32x3" if exact and not interpreted else "ieee"
    return {"DTYPE": operands, "PRECISION": precision, "EXACT": exact}


def walkable(x: Tensor) -> Tensor:
    """x with a contiguous last dim; kernels walk the strides of the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block(x: Tensor | None) -> Tensor | None:
    """x as a kernel reads it that walks no strides."""
    return x if x is None else x.contiguous()


def sum_groups(x: Tensor, dim: int, kv_heads: int) -> Tensor:
    """x with its query heads, along dim, summed over those of each kv head, in x's dtype.

    The sum is formed in float32 or wider; autocast, where it is on, would also return that.
    """
    if x.shape[dim] == kv_heads:
        return x
    return x.unflatten(dim, (kv_heads, -1)).sum(dim + 1, dtype=x.dtype)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> Any:
    """Run a kernel with so many programs; a grid's first axis alone holds 2^31 of them.

    ``constants`` are its constexpr arguments and options such as num_warps. Returns the compiled
    kernel, None from the interpreter.
    """
    return kernel[(programs,)](*arguments, **constants)
