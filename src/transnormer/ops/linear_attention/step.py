"""One decode step: a few tokens against a state of constant size."""

import torch
from torch import Tensor

from transnormer.ops import checks

_MAX_TOKENS = 8


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


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
) -> None:
    batch, tokens, heads, key_dim = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[3]
    if not 1 <= tokens <= _MAX_TOKENS:
        raise ValueError(
            f"tokens is {tokens}; expected 1 to {_MAX_TOKENS} a step; use linear_attention"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"heads is {heads}; expected a multiple of kv_heads, which is {kv_heads}")
    checks.check_shape("k", k, (batch, tokens, kv_heads, key_dim), "batch tokens kv_heads key_dim")
    checks.check_shape(
        "v", v, (batch, tokens, kv_heads, value_dim), "batch tokens kv_heads value_dim"
    )
    for name, x in (("k", k), ("v", v)):
        checks.check_same(name, x, q.dtype, q.device, "q")
    rows = batch if slots is None else state.shape[0]
    checks.check_shape(
        "state", state, (rows, kv_heads, key_dim, value_dim), "batch kv_heads key_dim value_dim"
    )
    accumulation = checks.accumulation_dtype(q.dtype)
    checks.check_same("state", state, accumulation, q.device, f"the sums of {q.dtype} inputs")
    if slots is not None:
        if slots.dtype != torch.int32:
            raise TypeError(f"slots is {slots.dtype}; expected torch.int32")
        checks.check_shape("slots", slots, (batch,), "batch")
    if log_decay is not None:
        if not log_decay.is_floating_point():
            raise TypeError(f"log_decay is {log_decay.dtype}; expected a floating dtype")
        checks.check_log_decay_values(log_decay)


def _check_log_decay_shape(log_decay: Tensor | None, k: Tensor, single: bool) -> Tensor | None:
    """Return log_decay with a tokens dim where it has a batch dim; raise ValueError otherwise."""
    batch, tokens, kv_heads, key_dim = k.shape
    if log_decay is None:
        return None
    lead = (batch,) if single else (batch, tokens)
    legal = [(kv_heads,), (*lead, kv_heads), (*lead, kv_heads, key_dim)]
    if tuple(log_decay.shape) not in legal:
        raise ValueError(
            f"log_decay has shape {list(log_decay.shape)}; expected one of {[list(s) for s in legal]}"
        )
    return log_decay.unsqueeze(1) if single and log_decay.dim() > 1 else log_decay


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
        inplace: update ``state`` itself; not differentiable.

    Returns:
        o, [batch(, tokens), heads, value_dim] in the inputs' dtype, and the state after the last
        token (``state`` itself where it was updated in place).

    Raises:
        ValueError: a shape, or (CPU, eager) a log_decay that is NaN or positive, a slot outside
            the pool.
        TypeError: dtypes that differ, or a state in another than the accumulation dtype.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("state", state)):
        checks.check_tensor(name, x)
    for name, x in (("log_decay", log_decay), ("slots", slots)):
        checks.check_tensor(name, x, optional=True)
    scale = checks.check_number("scale", scale)
    checks.check_float("q", q)
    q, k, v = (x.to(checks.autocast_dtype(x)) for x in (q, k, v))
    single = q.dim() == 3
    if single:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    for name, x, dims in (
        ("q", q, "batch tokens heads key_dim"),
        ("k", k, "batch tokens kv_heads key_dim"),
        ("v", v, "batch tokens kv_heads value_dim"),
    ):
        checks.check_rank(name, x, dims)
    _check(q, k, v, log_decay, state, slots)
    if (inplace or slots is not None) and 0 in state.stride():
        raise ValueError(
            f"state has strides {list(state.stride())}; expected rows of their own to update in "
            "place; pass state.clone()"
        )
    decay = _decays(_check_log_decay_shape(log_decay, k, single), k)
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
    if checks.values_are_visible(slots):
        used = [slot for slot in slots.tolist() if slot != -1]
        if any(not 0 <= slot < pool.shape[0] for slot in used) or len(set(used)) < len(used):
            raise ValueError(
                f"slots is {slots.tolist()}; expected -1 (skip) or a row of the pool, 0 to "
                f"{pool.shape[0] - 1}, each at most once"
            )
    live, row = slots >= 0, torch.arange(slots.shape[0], device=slots.device)
    used = slots.clamp(min=0).long()
    old = pool[used]
    part, updated = _advance(q, k, v, decay, old, inplace=False)
    # A skipped row writes what the first live row writes, to the same slot; without a live row,
    # slot 0 gets back what it holds. So no index depends on values, and nothing waits for a GPU.
    source = torch.where(live, row, live.int().argmax())
    pool[used[source]] = torch.where(live.any(), updated, old)[source]
    return part.masked_fill(~live.view(-1, 1, 1, 1, 1), 0.0)
