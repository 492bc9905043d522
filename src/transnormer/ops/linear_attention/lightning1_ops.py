"""Lightning Attention 1 (quadratic tiles): its Triton form as torch ops, and where it runs.

``attention_ops`` has the ops' contract for torch, ``triton_lightning1_launch`` what they run; this file
needs no Triton.
"""

import torch
from torch import Tensor

from transnormer.ops.kernel_devices import constant_when_compiled, why_not
from transnormer.ops.linear_attention.attention_ops import define_attention
from transnormer.ops.linear_attention.lightning1 import lightning1_linear_attention
from transnormer.ops.linear_attention.sequences import from_first_to_last

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


lightning1_attention = define_attention("lightning1_attention", "triton_lightning1_launch")


@constant_when_compiled
def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and why_not(device) is None


def runs_kernels(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether "lightning1" means the Triton kernels for such a call, or else the PyTorch form."""
    return dtype in _DTYPES and key_dim <= 256 and value_dim <= 512 and _has_kernels(device)


_plain = from_first_to_last(lightning1_linear_attention)


def lightning1(
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
    """Quadratic tiles; arguments and results as ``linear_attention``'s, log_decay None or [heads].

    Runs as Triton kernels on a GPU that has them, and in plain PyTorch elsewhere, for float64 and for
    heads wider than key_dim 256 or value_dim 512.
    """
    kernels = runs_kernels(q.device, q.dtype, k.shape[3], v.shape[3])
    run = lightning1_attention if kernels else _plain
    return run(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
    )
