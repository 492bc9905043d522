"""Where Triton kernels can run: one rule for every op of the package."""

from functools import cache
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


@cache
def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of a device, or None where they can."""
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
