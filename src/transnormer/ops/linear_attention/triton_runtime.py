"""Launching kernels: on the inputs' device, on its current stream."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


_compiled: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}


def _form(x: Any) -> Any:
    """What Triton compiles differently for: dtype and alignment, or the kind of an integer."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, int):
        return x == 1, x % 16 == 0, x >= 2**31
    return x is None


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel with so many programs; a grid's first axis alone holds 2^31 of them.

    A compiled kernel is kept by what Triton would tell it apart by, and then called directly:
    Triton's own look-up costs more than the rest of a launch, since it inspects each argument anew.

    Args:
        kernel: a function under ``triton.jit``.
        programs: size of the grid.
        arguments: those known at run time, the first one a tensor, in the order of the signature.
        constants: all constexpr arguments by name, and options such as num_warps.
    """
    key = (id(kernel), arguments[0].device, *map(_form, arguments), *constants.items())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*arguments, **constants)
        if isinstance(compiled, CompiledKernel):
            if any(parameter.is_constexpr for parameter in kernel.params[: len(arguments)]):
                raise TypeError(f"{kernel.__name__} was given a constexpr argument by position")
            _compiled[key] = compiled, kernel.arg_names[len(arguments) :]
        return
    compiled, names = found
    compiled[(programs, 1, 1)](*arguments, *[constants[name] for name in names])
