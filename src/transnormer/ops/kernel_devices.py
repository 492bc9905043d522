"""Where Triton kernels can run: one rule for every op of the package."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

HAS_TRITON = find_spec("triton") is not None


def constant_when_compiled(function: F) -> F:
    """Have torch.compile call a function of constants while it traces, not trace into it.

    What torch.compiler.assume_constant_result does; but that imports the compiler, which takes as
    long as importing torch.
    """
    function._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]
    return function


@constant_when_compiled
def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of a device, or None where they can."""
    return _why_not(device)


@cache
def _why_not(device: torch.device) -> str | None:
    if not HAS_TRITON:
        return "the package triton is not installed; install it"
    if device.type == "meta":
        return None
    if device.type != "cuda":
        return f"inputs are on {device}; move them to a GPU"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs, this is an AMD build of torch"
    if not torch.cuda.is_available():
        # A fake tensor: nothing but shapes is asked for.
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than compute capability 8.0; move the inputs to a newer GPU"
    return None


@constant_when_compiled
def why_not_named(device: torch.device, named: bool) -> str | None:
    """The same where the kernels may have been named: then Triton's interpreter does, too.

    It is for tests: thousands of times slower, so it is never chosen by itself.
    """
    if device.type == "cpu" and named and HAS_TRITON:
        from triton import knobs

        if knobs.runtime.interpret:
            return None
    return why_not(device)
