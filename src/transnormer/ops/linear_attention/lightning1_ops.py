"""Lightning Attention 1 (quadratic tiles): its Triton form as torch ops, and where it runs.

This file has the ops' contract for torch (schemas, shapes, gradients) and needs no Triton;
``triton_lightning1_launch`` has what they run.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from transnormer.ops.linear_attention.lightning1 import lightning1_linear_attention
from transnormer.ops.linear_attention.sequences import from_first_to_last

_HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("transnormer", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool reverse"
)
# Defined by schema instead of by torch.library.custom_op, whose checks cost 10 us a call.
_LIBRARY.define(
    f"lightning1_attention({_INPUTS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.define(
    f"lightning1_attention_backward(Tensor grad_o, Tensor? grad_final, {_INPUTS}, "
    "bool with_decay, bool with_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _forward(*args):
    from transnormer.ops.linear_attention import triton_lightning1_launch

    return triton_lightning1_launch.forward(*args)


def _backward(*args):
    from transnormer.ops.linear_attention import triton_lightning1_launch

    return triton_lightning1_launch.backward(*args)


_LIBRARY.impl("lightning1_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lightning1_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("transnormer::lightning1_attention")
def _(q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse):
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(sequences, *k.shape[2:], v.shape[3], dtype=torch.float32)
    return v.new_empty(*q.shape[:3], v.shape[3]), final


@torch.library.register_fake("transnormer::lightning1_attention_backward")
def _(
    grad_o, grad_final, q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse, with_decay,
    with_state,
):  # fmt: skip
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, *k.shape[2:], v.shape[3]) if with_state else (0,)
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        log_decay.new_empty(log_decay.shape) if with_decay else q.new_empty(0),
        q.new_empty(shape, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)
    # States take no gradient where nobody uses them; zeros of their size would be made otherwise.
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_o, grad_final):
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    if grad_o is None:
        grad_o = v.new_zeros(*q.shape[:3], v.shape[3])
    with_decay = log_decay is not None and ctx.needs_input_grad[3]
    with_state = initial_state is not None and ctx.needs_input_grad[4]
    grads = torch.ops.transnormer.lightning1_attention_backward(
        grad_o, grad_final, q, k, v, log_decay, initial_state, cu_seqlens, ctx.scale, ctx.reverse,
        with_decay, with_state,
    )  # fmt: skip
    d_decay, d_state = grads[3] if with_decay else None, grads[4] if with_state else None
    return *grads[:3], d_decay, d_state, None, None, None


torch.library.register_autograd(
    "transnormer::lightning1_attention", _gradients, setup_context=_setup_context
)


def lightning1_attention(
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
    """Quadratic tiles by the Triton kernels; arguments as ``linear_attention``'s.

    Products take the inputs' dtype (float32: three tf32 products, IEEE accuracy) and sum in
    float32; states are float32 and are rounded to the inputs' dtype only inside products.
    """
    return torch.ops.transnormer.lightning1_attention(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse
    )


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton compiles for a device."""
    if device.type != "cuda" or not _HAS_TRITON:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


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

    Runs as Triton kernels on a GPU, and in plain PyTorch on other devices, for float64 and for
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
