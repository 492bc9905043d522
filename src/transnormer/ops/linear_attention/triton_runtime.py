"""Launching kernels: on the inputs' device, on its current stream."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


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


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Run a kernel with so many programs; a grid's first axis alone holds 2^31 of them."""
    kernel[(programs,)](*arguments, **options)
