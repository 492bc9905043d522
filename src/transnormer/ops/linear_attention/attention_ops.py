"""Linear attention as a torch op with its backward op, for the forms whose kernels are Triton's.

What torch has to know (schema, shapes, gradients) needs no Triton; a form adds what the two ops run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from transnormer.ops import kernel_ops
from transnormer.ops.kernel_ops import Form

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool reverse"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def _fake_forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse):
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = v.new_empty(sequences, *k.shape[2:], v.shape[3], dtype=torch.float32)
    return v.new_empty(*q.shape[:3], v.shape[3]), final


def _fake_backward(
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


def define_attention(name: str, launches: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Define ``transnormer::name`` and ``transnormer::name_backward``; return the first's caller.

    The caller has the arguments of ``linear_attention``. Products take the inputs' dtype (float32:
    three tf32 products, IEEE accuracy) and sum in float32; states are float32 and are rounded to
    the inputs' dtype only inside products. A second derivative raises NotImplementedError.

    Args:
        name: of the op.
        launches: the module beside this one that is imported when the op first runs. Its
            ``forward`` takes (q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse) and
            returns (o, final_state); its ``backward`` takes (grad_o, grad_final or None, the
            inputs of forward, with_decay, with_state) and returns the gradients of q, k, v,
            log_decay, initial_state, the last two empty, in q's dtype and in float32, where they
            are not asked for.
    """

    def gradients(ctx, grad_o, grad_final):
        q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
        if grad_o is None:
            grad_o = v.new_zeros(*q.shape[:3], v.shape[3])
        with_decay = log_decay is not None and ctx.needs_input_grad[3]
        with_state = initial_state is not None and ctx.needs_input_grad[4]
        grads = run_backward(
            grad_o, grad_final, q, k, v, log_decay, initial_state, cu_seqlens, ctx.scale,
            ctx.reverse, with_decay, with_state,
        )  # fmt: skip
        d_decay, d_state = grads[3] if with_decay else None, grads[4] if with_state else None
        return *grads[:3], d_decay, d_state, None, None, None

    run, run_backward = kernel_ops.define(
        name,
        f"{__package__}.{launches}",
        Form(f"({_INPUTS}) -> (Tensor, Tensor)", _fake_forward),
        Form(
            f"(Tensor grad_o, Tensor? grad_final, {_INPUTS}, bool with_decay, bool with_state) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor)",
            _fake_backward,
        ),
        _setup_context,
        gradients,
        tags=_TAGS,
        differentiable="reference",
    )

    def attention(
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
        return run(q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse)

    return attention
