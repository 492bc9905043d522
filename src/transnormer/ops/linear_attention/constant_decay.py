"""Linear attention with constant decay as torch ops whose kernels are Triton's.

The backward op computes the states between the segments of a sequence again instead of keeping
them: how many there are depends on the length, and a compiled graph would hold for few lengths.

This file has the ops' contract for torch (schemas, shapes, gradients) and needs no Triton;
``triton_launch`` has what they run.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.ops.linear_attention import launch_config
from transnormer.ops.linear_attention.launch_config import Gpu


class Plan(NamedTuple):
    """How the tokens of a call are cut into units of at most ``length`` tokens."""

    units: int
    length: int
    segments: int  # of each sequence; 0 where sequences are packed
    carried: bool  # whether a state passes from unit to unit


@cache
def gpu_of(device: torch.device) -> Gpu:
    """What matters of a GPU; an H100 for what is none (the interpreter)."""
    if device.type != "cuda":
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    # The stubs of torch's CPU build lack it.
    shared = properties.shared_memory_per_block_optin  # pyrefly: ignore[missing-attribute]
    return Gpu(properties.multi_processor_count, shared)


def plan(k: Tensor, heads: int, cu_seqlens: Tensor | None) -> Plan:
    """The cut of a call; shapes alone decide, so that nothing waits for the device."""
    batch, seq = k.shape[:2]
    gpu = gpu_of(k.device)
    if cu_seqlens is not None:
        length = launch_config.packed_length(heads, seq, gpu)
        return Plan(cu_seqlens.shape[0] - 1 + seq // length, length, 0, True)
    segments = launch_config.segments_of(batch * heads, seq, gpu)
    if segments == 1:
        return Plan(batch, seq, 1, False)
    step = segments * 64 * launch_config.PIECES
    return Plan(batch * segments, -(-seq // step) * 64 * launch_config.PIECES, segments, True)


_LIBRARY = torch.library.Library("transnormer", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens"
)
# Defined by schema instead of by torch.library.custom_op, whose checks cost 10 us a call.
_LIBRARY.define(
    f"constant_decay_attention({_INPUTS}, float scale, bool reverse) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.define(
    f"constant_decay_attention_backward(Tensor grad_o, Tensor? grad_final, {_INPUTS}, "
    "float scale, bool reverse, bool with_decay, bool with_state) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _forward(*args):
    from transnormer.ops.linear_attention import triton_launch

    return triton_launch.forward(*args)


def _backward(*args):
    from transnormer.ops.linear_attention import triton_launch

    return triton_launch.backward(*args)


_LIBRARY.impl("constant_decay_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("constant_decay_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("transnormer::constant_decay_attention")
def _(q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse):
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(sequences, *k.shape[2:], v.shape[3], dtype=torch.float32)
    return v.new_empty(*q.shape[:3], v.shape[3]), final


@torch.library.register_fake("transnormer::constant_decay_attention_backward")
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
    grads = torch.ops.transnormer.constant_decay_attention_backward(
        grad_o, grad_final, q, k, v, log_decay, initial_state, cu_seqlens, ctx.scale, ctx.reverse,
        with_decay, with_state,
    )  # fmt: skip
    d_decay, d_state = grads[3] if with_decay else None, grads[4] if with_state else None
    return *grads[:3], d_decay, d_state, None, None, None


torch.library.register_autograd(
    "transnormer::constant_decay_attention", _gradients, setup_context=_setup_context
)


def constant_decay_attention(
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
    """Linear attention by the Triton kernels; arguments as ``linear_attention``'s.

    Products take the inputs' dtype (float32: three tf32 products, IEEE accuracy) and sum in
    float32; states are float32 and are rounded to the inputs' dtype only inside products.
    """
    return torch.ops.transnormer.constant_decay_attention(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse
    )
