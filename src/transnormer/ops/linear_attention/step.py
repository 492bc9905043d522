"""One decode step: a few tokens against a state of constant size."""

import torch
from torch import Tensor

from transnormer.ops import checks
from transnormer.ops.linear_attention import decode_ops

MAX_TOKENS = 8


def _decays(log_decay: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor] | None:
    """Any form of log_decay as decays (kept, rest), [B or 1, tokens or 1, H, 1 or K], or None.

    decay = kept + rest with kept 0 or 1: near 1 the float32 decay is off the same way at every
    token, which adds up over a text; state + expm1(log_decay) * state rounds without direction.
    """
    if log_decay is None:
        return None
    g = log_decay.to(checks.accumulation_dtype(k.dtype))
    if g.dim() == 1:
        g = g.view(1, 1, -1, 1)
    elif g.dim() == 3:
        g = g[..., None]
    near = g > -0.5
    return near.to(g.dtype), torch.where(near, g.clamp(min=-0.5).expm1(), g.exp())


def _advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: tuple[Tensor, Tensor] | None,
    state: Tensor,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The recurrence over q [B, T, H, G, K], k and v [B, T, H, dim] in the accumulation dtype."""
    outputs, start = [], state
    for t in range(k.shape[1]):
        added = k[:, t, :, :, None] * v[:, t, :, None, :]
        if decay is None:
            state = state + added
        else:
            kept, rest = (x[:, min(t, x.shape[1] - 1), :, :, None] for x in decay)
            state = torch.addcmul(torch.addcmul(added, state, rest), state, kept)
        outputs.append(q[:, t] @ state)
    return torch.stack(outputs, 1), start.copy_(state) if inplace else state


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check q, k and v of a step: one layout, 1 to 8 tokens, one dtype, one device."""
    rank = q.dim()
    lead = "batch" if rank == 3 else "batch tokens"
    for name, x, dims in (
        ("q", q, f"{lead} heads key_dim"),
        ("k", k, f"{lead} kv_heads key_dim"),
        ("v", v, f"{lead} kv_heads value_dim"),
    ):
        if x.dim() != rank or not 3 <= rank <= 4:
            checks.check_rank(name, x, dims)
    *batch_tokens, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[-2:]
    if rank == 4 and not 1 <= batch_tokens[1] <= MAX_TOKENS:
        raise ValueError(
            f"tokens is {batch_tokens[1]}; expected 1 to {MAX_TOKENS} a step; use linear_attention"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"heads is {heads}; expected a multiple of kv_heads, which is {kv_heads}")
    checks.check_shape("k", k, (*batch_tokens, kv_heads, key_dim), f"{lead} kv_heads key_dim")
    checks.check_shape("v", v, (*batch_tokens, kv_heads, value_dim), f"{lead} kv_heads value_dim")
    checks.check_same("k", k, q.dtype, q.device, "q")
    checks.check_same("v", v, q.dtype, q.device, "q")


def check_slots(slots: Tensor, rows: int, q: Tensor) -> None:
    """Check slots, int32 [batch]: -1 or rows of a pool, seen (CPU, eager) at most once each."""
    if slots.dtype != torch.int32:
        raise TypeError(f"slots is {slots.dtype}; expected torch.int32")
    checks.check_shape("slots", slots, q.shape[:1], "batch")
    if slots.device != q.device:
        raise ValueError(f"slots is on {slots.device}; expected {q.device}; move it")
    if checks.values_are_visible(slots):
        used = [slot for slot in slots.tolist() if slot != -1]
        if any(not 0 <= slot < rows for slot in used) or len(set(used)) < len(used):
            raise ValueError(
                f"slots is {slots.tolist()}; expected -1 (skip) or a row of the pool, 0 to "
                f"{rows - 1}, each at most once"
            )


def check_own_rows(name: str, x: Tensor) -> None:
    """Raise ValueError where entries of x share memory, as those of an expanded tensor do."""
    strides = x.stride()
    # A dim of size 1 may have any stride.
    if 0 in strides and any(n > 1 and s == 0 for n, s in zip(x.shape, strides, strict=True)):
        raise ValueError(
            f"{name} has strides {list(strides)}; expected rows of their own to update in place; "
            f"pass {name}.clone()"
        )


def _check_log_decay(log_decay: Tensor, q: Tensor, kv_heads: int) -> None:
    *lead, _, key_dim = q.shape
    legal = ((kv_heads,), (*lead, kv_heads), (*lead, kv_heads, key_dim))
    if tuple(log_decay.shape) not in legal:
        raise ValueError(
            f"log_decay has shape {list(log_decay.shape)}; expected one of {[list(s) for s in legal]}"
        )
    if not log_decay.is_floating_point():
        raise TypeError(f"log_decay is {log_decay.dtype}; expected a floating dtype")
    if log_decay.device != q.device:
        raise ValueError(f"log_decay is on {log_decay.device}; expected {q.device}; move it")
    checks.check_log_decay_values(log_decay)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    slots: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence of ``linear_attention`` by 1 to 8 tokens.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T;  o_t = scale * q_t S_t.

    On CUDA, under the rule of ``decode_ops.runs_kernel``, one kernel does it all (``triton_step``):
    the state crosses the memory bus once each way, and a slot outside the pool makes its output NaN
    and touches nothing. Otherwise, and always where gradients are needed, the step is made of
    PyTorch operations, which are differentiable.

    Args:
        q: queries, [batch, heads, key_dim], or [batch, tokens, heads, key_dim] with tokens <= 8.
        k: keys, [batch(, tokens), kv_heads, key_dim]; kv_heads divides heads.
        v: values, [batch(, tokens), kv_heads, value_dim].
        log_decay: None, [kv_heads], [batch(, tokens), kv_heads] or
            [batch(, tokens), kv_heads, key_dim]; at most 0.
        state: [batch, kv_heads, key_dim, value_dim], float32 (float64 for float64 inputs); with
            slots a pool [num_slots, kv_heads, key_dim, value_dim].
        scale: multiplies the output.
        slots: int32 [batch], the row of the pool that each row of the batch reads and writes; rows
            with -1 are skipped (their output is 0). Two rows may not share a slot. Implies inplace.
        inplace: update ``state`` itself. Autograd follows that as any write: gradients reach q, k
            and v, and log_decay with slots, which copy the rows they read; without slots a
            log_decay that requires a gradient makes the backward raise RuntimeError, since the
            state it was multiplied by is gone. A leaf state that requires a gradient is refused.

    Returns:
        o, [batch(, tokens), heads, value_dim] in the inputs' dtype, and the state after the last
        token (``state`` itself where it was updated in place).

    Raises:
        ValueError: a shape, or (CPU, eager) a log_decay that is NaN or positive, a slot outside
            the pool, or a state to be updated whose rows share memory.
        TypeError: dtypes that differ, or a state in another than the accumulation dtype.
        RuntimeError: (PyTorch's) a leaf state that requires a gradient, in place.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("state", state)):
        checks.check_tensor(name, x)
    for name, x in (("log_decay", log_decay), ("slots", slots)):
        checks.check_tensor(name, x, optional=True)
    scale = checks.check_number("scale", scale)
    checks.check_float("q", q)
    if checks.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(checks.autocast_dtype(x)) for x in (q, k, v))
    check_shapes(q, k, v)
    kv_heads, value_dim = v.shape[-2:]
    row_dim, rows = ("batch", q.shape[0]) if slots is None else ("num_slots", state.shape[0])
    checks.check_shape(
        "state",
        state,
        (rows, kv_heads, q.shape[-1], value_dim),
        f"{row_dim} kv_heads key_dim value_dim",
    )
    accumulation = checks.accumulation_dtype(q.dtype)
    checks.check_same("state", state, accumulation, q.device, f"the sums of {q.dtype} inputs")
    if log_decay is not None:
        _check_log_decay(log_decay, q, kv_heads)
    if slots is not None:
        check_slots(slots, rows, q)
        inplace = True
    if inplace:
        check_own_rows("state", state)
    if not decode_ops.runs_kernel(q, v, k, log_decay, state):
        return _plain_step(q, k, v, log_decay, state, scale, slots, inplace)
    if inplace:
        return decode_ops.step_inplace(q, k, v, log_decay, state, slots, scale), state
    return decode_ops.step(q, k, v, log_decay, state, scale)


def _plain_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    slots: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The step in PyTorch: every device and dtype, and differentiable."""
    single = q.dim() == 3
    if single:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        if log_decay is not None and log_decay.dim() > 1:
            log_decay = log_decay.unsqueeze(1)
    decay = _decays(log_decay, k)
    dtype = checks.accumulation_dtype(q.dtype)
    q_ = q.to(dtype).unflatten(2, (k.shape[2], -1)) * scale
    # Autocast has done its part; further in it would round the float32 sums too.
    with checks.no_autocast(q.device.type):
        if slots is None:
            o, state = _advance(q_, k.to(dtype), v.to(dtype), decay, state, inplace)
        else:
            o = _advance_slots(q_, k.to(dtype), v.to(dtype), decay, state, slots)
    o = o.flatten(2, 3).to(q.dtype)
    return (o[:, 0] if single else o), state


def _advance_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: tuple[Tensor, Tensor] | None,
    pool: Tensor,
    slots: Tensor,
) -> Tensor:
    live, used = slots >= 0, slots.clamp(min=0).long()
    old = pool[used]
    part, updated = _advance(q, k, v, decay, old, inplace=False)
    write_live_rows(pool, used, live, updated, old)
    # -1 is skipped; other slots below 0 have to show.
    blank = torch.where(slots == -1, 0.0, float("nan")).to(part.dtype)
    return torch.where(live.view(-1, 1, 1, 1, 1), part, blank.view(-1, 1, 1, 1, 1))


def write_live_rows(pool: Tensor, used: Tensor, live: Tensor, updated: Tensor, old: Tensor) -> None:
    """Set pool[used[i]] to updated[i] where live[i], without waiting for a GPU; old is pool[used].

    A row that is not live writes what the first live row writes, to the same place; without a live
    row, each gets back what it holds. So no index's shape depends on values.
    """
    if used.shape[0] == 0:
        return
    row = torch.arange(used.shape[0], device=used.device)
    source = torch.where(live, row, live.int().argmax())
    pool[used[source]] = torch.where(live.any(), updated, old)[source]
