"""Linear attention with decay: the contract, its checks and the choice of an implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.ops import checks
from transnormer.ops.dispatch import Implementation, choose
from transnormer.ops.kernel_devices import why_not_named
from transnormer.ops.linear_attention.chunked import chunked_linear_attention
from transnormer.ops.linear_attention.constant_decay import (
    constant_decay_attention,
    scalar_gate_attention,
)
from transnormer.ops.linear_attention.gated_decay import gated_decay_attention
from transnormer.ops.linear_attention.lightning1_ops import lightning1
from transnormer.ops.linear_attention.reference import recurrence
from transnormer.ops.linear_attention.ring import RingState, linear_attention_ring_step
from transnormer.ops.linear_attention.sequences import from_first_to_last
from transnormer.ops.linear_attention.step import linear_attention_step

__all__ = [
    "RingState",
    "linear_attention",
    "linear_attention_ring_step",
    "linear_attention_step",
]


class Request(NamedTuple):
    """What an implementation may refuse on."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    decay_dims: int  # 0 where log_decay is None, else its rank: 1 constant, 3 and 4 gated
    named: bool


def _needs_constant_decay(request: Request) -> Exception | None:
    if request.decay_dims <= 1:
        return None
    return NotImplementedError(
        "implementation 'lightning1' (quadratic tiles) exists for constant decay only, log_decay "
        "None or [kv_heads]; use 'chunked' or 'auto' for gated decay"
    )


def _needs_triton(request: Request) -> Exception | None:
    reason = why_not_named(request.device, request.named)
    if reason is not None:
        return RuntimeError(f"implementation 'triton': {reason}, or use 'auto' or 'chunked'")
    if request.dtype == torch.float64:
        what, expected = "q is torch.float64", "float32, bfloat16 or float16"
    elif not (request.key_dim <= 256 and request.value_dim <= 512):
        what = f"key_dim is {request.key_dim} and value_dim {request.value_dim}"
        expected = "at most 256 and 512"
    else:
        return None
    return NotImplementedError(
        f"implementation 'triton': {what}; expected {expected}; use 'auto' or 'chunked'"
    )


def _triton_attention(
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
    """The kernels for the kind of decay."""
    run = constant_decay_attention
    if log_decay is not None and log_decay.dim() > 1:
        run = gated_decay_attention
        if log_decay.dim() == 3 and q.dtype == torch.float32:
            # Products of three make the backward sweep of a scalar gate too large for registers.
            log_decay = log_decay[..., None].expand(k.shape)
        elif log_decay.dim() == 3:
            run = scalar_gate_attention
    return run(
        q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        reverse=reverse,
    )  # fmt: skip


# The first automatic row that does not refuse runs.
IMPLEMENTATIONS = (
    Implementation("triton", _needs_triton, _triton_attention),
    Implementation("chunked", lambda _: None, from_first_to_last(chunked_linear_attention)),
    Implementation("lightning1", _needs_constant_decay, lightning1, False),
    Implementation("reference", lambda _: None, from_first_to_last(recurrence), False),
)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    checks.check_rank("q", q, "batch seq heads key_dim")
    checks.check_rank("k", k, "batch seq kv_heads key_dim")
    checks.check_rank("v", v, "batch seq kv_heads value_dim")
    batch, seq, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    if not (batch and heads and kv_heads and key_dim and value_dim):
        names = ("batch", "heads", "kv_heads", "key_dim", "value_dim")
        sizes = (batch, heads, kv_heads, key_dim, value_dim)
        name = names[[bool(size) for size in sizes].index(False)]
        raise ValueError(f"{name} is 0; expected at least 1")
    if heads % kv_heads:
        raise ValueError(f"heads is {heads}; expected a multiple of kv_heads, which is {kv_heads}")
    checks.check_shape("k", k, (batch, seq, kv_heads, key_dim), "batch seq kv_heads key_dim")
    dims = "batch seq kv_heads value_dim"
    checks.check_shape("v", v, (batch, seq, kv_heads, value_dim), dims)
    checks.check_same("k", k, q.dtype, q.device, "q")
    checks.check_same("v", v, q.dtype, q.device, "q")


def _check_log_decay(log_decay: Tensor, k: Tensor) -> None:
    legal = (k.shape[2:3], k.shape[:3], k.shape)
    if log_decay.shape not in legal:
        raise ValueError(
            f"log_decay has shape {list(log_decay.shape)}; expected {list(legal[0])}, "
            f"{list(legal[1])} or {list(legal[2])} ([kv_heads], [batch, seq, kv_heads] or "
            "[batch, seq, kv_heads, key_dim])"
        )
    if not log_decay.is_floating_point():
        raise TypeError(f"log_decay is {log_decay.dtype}; expected a floating dtype, best float32")
    if log_decay.device != k.device:
        raise ValueError(f"log_decay is on {log_decay.device}; expected {k.device}; move it")
    checks.check_log_decay_values(log_decay)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with decay, its final state returned.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T;  o_t = scale * q_t S_t: the diagonal is included;
    there is no softmax, no denominator and no 1/sqrt(key_dim). State and sums are float32 (float64
    for float64 inputs). Differentiable in q, k, v, log_decay and initial_state, through o and
    final_state. Under autocast q, k and v are cast, log_decay and states are not.
    Source: Qin et al. 2023, arXiv:2307.14995; Qin et al. 2024, arXiv:2401.04658.

    Args:
        q: queries, [batch, seq, heads, key_dim], float64, float32, bfloat16 or float16.
        k: keys, [batch, seq, kv_heads, key_dim]; query head i reads kv head
            i // (heads / kv_heads). k and v have q's dtype and device.
        v: values, [batch, seq, kv_heads, value_dim].
        log_decay: None (no decay), [kv_heads] (constant), [batch, seq, kv_heads] or
            [batch, seq, kv_heads, key_dim] (gated); at most 0, best float32. -inf forgets all
            history and gets gradient 0.
        scale: multiplies the outputs.
        initial_state: state before the first token, [batch, kv_heads, key_dim, value_dim] in the
            dtype of the sums; with cu_seqlens [num_sequences, ...]. None is zero.
        cu_seqlens: bounds of packed sequences along seq, int32 or int64 [num_sequences + 1]; batch
            is then 1. An empty sequence passes its state through. On a GPU nobody reads them
            first: bounds that do not cover seq leave undefined outputs there.
        reverse: run from the last token of every sequence to its first.
        implementation: "auto" takes the first that can run; or "triton", "chunked" (linear time),
            "lightning1" (quadratic tiles, constant decay), "reference" (token by token).

    Returns:
        o, [batch, seq, heads, value_dim] in q's dtype, and the state after the last token (the
        first one if reverse), shaped as initial_state.

    Raises:
        ValueError: a shape, device, unknown implementation, or (CPU, eager) a NaN or positive
            log_decay or cu_seqlens that do not cover seq.
        TypeError: a dtype.
        NotImplementedError, RuntimeError: the named implementation cannot run; says why.
    """
    checks.check_tensor("q", q)
    checks.check_tensor("k", k)
    checks.check_tensor("v", v)
    checks.check_tensor("log_decay", log_decay, optional=True)
    checks.check_tensor("initial_state", initial_state, optional=True)
    checks.check_tensor("cu_seqlens", cu_seqlens, optional=True)
    scale = checks.check_number("scale", scale)
    checks.check_float("q", q)
    autocast = checks.is_autocast_enabled(q.device.type)
    if autocast:
        q, k, v = (x.to(checks.autocast_dtype(x)) for x in (q, k, v))
    _check_inputs(q, k, v)
    if log_decay is not None:
        _check_log_decay(log_decay, k)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1], q.device)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, k.shape[2], k.shape[3], v.shape[3])
    accumulation = checks.accumulation_dtype(q.dtype)
    if initial_state is not None:
        name = "batch" if cu_seqlens is None else "num_sequences"
        dims = f"{name} kv_heads key_dim value_dim"
        checks.check_shape("initial_state", initial_state, shape, dims)
        checks.check_same("initial_state", initial_state, accumulation, q.device, "the state")
    decay_dims = 0 if log_decay is None else log_decay.dim()
    named = implementation != "auto"
    request = Request(q.device, q.dtype, k.shape[3], v.shape[3], decay_dims, named)
    row = choose("linear_attention", IMPLEMENTATIONS, request, implementation)
    if q.shape[1] == 0:
        if initial_state is None:
            initial_state = torch.zeros(shape, dtype=accumulation, device=q.device)
        # Sums of nothing, which still belong to the graph of the inputs.
        nothing = q.sum() + k.sum() + v.sum()
        if log_decay is not None:
            nothing = nothing + log_decay[:0].sum().to(nothing.dtype)
        o = v.new_zeros(q.shape[0], 0, q.shape[2], v.shape[3]) + nothing
        return o, initial_state + nothing.to(accumulation)
    arguments = {
        "scale": scale,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "reverse": bool(reverse),
    }
    if not autocast:
        return row.run(q, k, v, log_decay, **arguments)
    # Autocast has done its part; inside the op it would round the float32 sums too.
    with checks.no_autocast(q.device.type):
        return row.run(q, k, v, log_decay, **arguments)
