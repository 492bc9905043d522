"""A decoding step of a TransNormerLLM in few kernels, for CUDA graphs: Triton only, no gradients.

What a step does besides its matrix products costs little arithmetic and many launches in PyTorch.
Here each kernel does all that lies between two products, and for a single row the products too:
a matrix is then read once by kernels that norm, gate or add on the way. ``infer.fused`` puts them
together; ``triton_pointwise`` and ``triton_projection`` hold them.
"""

import torch

from transnormer.ops.kernel_devices import why_not_named

# Of queries, keys, values and gates; kernels know them by their place.
ACTIVATIONS = ("none", "silu", "sigmoid", "relu")


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None; Triton's interpreter runs them on a CPU."""
    return why_not_named(device, named=True)
