"""Decode against a state that is seldom written: the last tokens stay in a ring beside it."""

from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.ops import checks
from transnormer.ops.linear_attention import decode_ops
from transnormer.ops.linear_attention.step import (
    check_own_rows,
    check_shapes,
    check_slots,
    write_live_rows,
)

MAX_CAPACITY = 32


def _power(g: Tensor, m: Tensor) -> Tensor:
    """exp(m * g) for integers m >= 0, g [..., H] against m [..., 1]; 1 for m = 0 at g = -inf too."""
    return torch.where(m > 0, (m.clamp(min=1) * g).exp(), 1.0)


def _decayed(state: Tensor, g: Tensor) -> Tensor:
    """exp(g) * state, state [..., H, K, V], g [..., H]; near 1 rounded without direction."""
    g = g[..., None, None]
    near = state + g.clamp(min=-0.5).expm1() * state
    return torch.where(g > -0.5, near, g.exp() * state)


class RingState(NamedTuple):
    """States that know all tokens but the last few, and these few as keys and values.

    A step reads a state but does not write it: the new token goes into the ring. Where a ring of
    ``capacity`` C entries would overflow, its oldest C / 2 entries are folded into the state, so a
    state is written once in C / 2 tokens. Half of the ring is kept at a fold because folded tokens
    cannot be taken back: of the positions up to the newest a row has ever held, the last C / 2 are
    never folded. So ``roll_back`` can always drop as many as C / 2 tokens (if the row holds so
    many), counted from that newest position, in one call or in several; with C = 16 that is all 8
    tokens of a call, whatever its row held before. A ring that folded all its entries at once
    would save a tenth of a state's read a step at head dim 128 and could guarantee nothing.

    Attributes:
        state: [slots, kv_heads, key_dim, value_dim], float32 (float64 for float64 inputs).
        keys: [slots, capacity, kv_heads, key_dim] in the inputs' dtype.
        values: [slots, capacity, kv_heads, value_dim] in the inputs' dtype.
        start: int32 [slots]; entry j of a row lies at (start + j) % capacity, the oldest is entry 0.
        length: int32 [slots], entries in use; -1 marks a row that was rolled back too far on a
            device whose values are not looked at: its outputs are NaN until it gets a new state.

    To give a row a new sequence, set its state and set its length to 0.
    """

    state: Tensor
    keys: Tensor
    values: Tensor
    start: Tensor
    length: Tensor

    @classmethod
    def from_state(
        cls, state: Tensor, *, capacity: int = 16, dtype: torch.dtype | None = None
    ) -> "RingState":
        """A ring without entries around a state, which it takes over (later folds write to it).

        Args:
            state: [slots, kv_heads, key_dim, value_dim], float32 or float64.
            capacity: entries of a ring, even, 2 to 32; a step takes up to half as many tokens.
            dtype: of keys and values, that of the later inputs; None is the state's.

        Raises:
            ValueError: a capacity or shape, a state whose rows share memory.
            TypeError: a dtype that is not floating, a state whose dtype is not that of the sums,
                a capacity that is no int.
        """
        checks.check_tensor("state", state)
        checks.check_rank("state", state, "slots kv_heads key_dim value_dim")
        check_own_rows("state", state)
        _check_int("capacity", capacity)
        if not 2 <= capacity <= MAX_CAPACITY or capacity % 2:
            raise ValueError(f"capacity is {capacity}; expected an even number from 2 to 32")
        dtype = state.dtype if dtype is None else dtype
        if dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype}; expected float64, float32, bfloat16 or float16")
        wanted = checks.accumulation_dtype(dtype)
        checks.check_same("state", state, wanted, state.device, f"the sums of {dtype} inputs")
        slots, kv_heads, key_dim, value_dim = state.shape
        # Zeros: what no step has written is never used, but may be copied and compared.
        keys = torch.zeros(slots, capacity, kv_heads, key_dim, dtype=dtype, device=state.device)
        values = torch.zeros(slots, capacity, kv_heads, value_dim, dtype=dtype, device=state.device)
        start = torch.zeros(slots, dtype=torch.int32, device=state.device)
        return cls(state, keys, values, start, torch.zeros_like(start))

    @classmethod
    def empty(
        cls,
        slots: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        capacity: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "RingState":
        """Rings that have seen no token, for inputs of ``dtype``; see ``from_state``."""
        shape = (slots, kv_heads, key_dim, value_dim)
        state = torch.zeros(shape, dtype=checks.accumulation_dtype(dtype), device=device)
        return cls.from_state(state, capacity=capacity, dtype=dtype)

    @property
    def capacity(self) -> int:
        """Entries that a ring has room for."""
        return self.keys.shape[1]

    def fold(self, log_decay: Tensor | None, slots: Tensor | None = None) -> Tensor:
        """The states after every token of the rings, as a new tensor; the rings are left as they are.

        S = exp(n * log_decay) * state + sum_{j < n} exp((n - 1 - j) * log_decay) k_j v_j^T.

        Args:
            log_decay: None or [kv_heads], that of the steps.
            slots: the rows to return, int32 or int64 [rows], none of them -1; None is all.

        Returns:
            [slots, kv_heads, key_dim, value_dim]; NaN for a row that was rolled back too far.

        Raises:
            ValueError, TypeError, NotImplementedError: a log_decay that the steps refuse.
        """
        checks.check_tensor("log_decay", log_decay, optional=True)
        if log_decay is not None:
            _check_constant(log_decay, self.state.device, self.state.shape[1])
        rows = self if slots is None else RingState(*(x[slots.long()] for x in self))
        g = _decay_per_head(log_decay, rows.state)
        order = _order(rows.start, rows.capacity)
        n = rows.length[:, None]
        held = (order < n)[..., None, None]
        keys = rows.keys.to(rows.state.dtype).masked_fill(~held, 0.0)
        values = rows.values.to(rows.state.dtype).masked_fill(~held, 0.0)
        weights = _power(g, (n - 1 - order)[..., None])
        folded = _decayed(rows.state, torch.where(n > 0, n.clamp(min=1) * g, 0.0))
        # Autocast would round the float32 sums.
        with checks.no_autocast(g.device.type):
            folded = folded + torch.einsum("bch,bchk,bchv->bhkv", weights, keys, values)
        return folded.masked_fill((n < 0)[..., None, None], float("nan"))

    def _dropped(self, tokens: int | Tensor) -> Tensor:
        """What ``roll_back`` got as an int32 tensor, without a copy from the host."""
        if isinstance(tokens, Tensor):
            if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
                raise TypeError(f"tokens is {tokens.dtype}; expected integers")
            if tokens.device != self.length.device:
                raise ValueError(
                    f"tokens is on {tokens.device}; expected {self.length.device}; move it"
                )
            return tokens.int()
        _check_int("tokens", tokens)
        if not 0 <= tokens <= self.capacity:
            raise ValueError(f"tokens is {tokens}; expected 0 to the capacity, {self.capacity}")
        return self.length.new_full((), tokens)

    def roll_back(self, tokens: int | Tensor, slots: Tensor | None = None) -> None:
        """Drop the last tokens of rows, in place, without waiting for a device.

        Args:
            tokens: how many, an int or one number a row (integers, [slots] or as ``slots``); at
                most as many as the rows' rings hold. The class says how many that is at least.
            slots: int32 or int64, the rows to change, each at most once, -1 skips; None is all.

        Raises:
            ValueError: an int outside 0 to capacity, tokens on another device; (CPU, eager) more
                tokens than a ring holds, or fewer than 0. Elsewhere such a row gets length -1,
                which makes its later outputs NaN.
            TypeError: tokens that are no integers.
        """
        dropped = self._dropped(tokens)
        if slots is not None:
            # One more row takes what -1 asks for.
            every = self.length.new_zeros(self.length.shape[0] + 1)
            index = torch.where(slots >= 0, slots, self.length.shape[0]).long()
            dropped = every.index_put((index,), dropped.expand(index.shape))[:-1]
        wrong = (dropped < 0) | (dropped > self.length)
        if checks.values_are_visible(wrong) and bool(wrong.any()):
            raise ValueError(
                f"tokens is {dropped.tolist()} for rings that hold {self.length.tolist()}; expected "
                "0 to what each holds; tokens folded into a state cannot be dropped"
            )
        self.length.copy_(torch.where(wrong, -1, self.length - dropped))


def _check_int(name: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} is {x!r}; expected an int")


def _order(start: Tensor, capacity: int) -> Tensor:
    """The age order j of every place of a ring, [rows, capacity]; 0 is the oldest."""
    return (torch.arange(capacity, device=start.device) - start[:, None]) % capacity


def _decay_per_head(log_decay: Tensor | None, state: Tensor) -> Tensor:
    """log_decay as [kv_heads] in the state's dtype."""
    if log_decay is None:
        return state.new_zeros(state.shape[1])
    return log_decay.to(state.dtype)


def _plain_ring_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    ring: RingState,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    """The ring step in PyTorch, by the formulas of ``triton_ring``; q [B, T, H * G, K] and so on."""
    tokens, capacity, half = q.shape[1], ring.capacity, ring.capacity // 2
    if slots is None:
        slots = torch.arange(q.shape[0], device=q.device)
    used = slots.clamp(min=0).long()
    old = RingState(*(x[used] for x in ring))
    live = (slots >= 0) & (old.length >= 0)
    dtype = old.state.dtype
    g = _decay_per_head(log_decay, old.state)
    n, order = old.length[:, None], _order(old.start, capacity)
    fold = n + tokens > capacity
    # Entries that no token has filled may hold anything, also NaN.
    held = (order < n)[..., None, None]
    keys, values = (x.masked_fill(~held, 0.0) for x in (old.keys, old.values))
    weights = torch.where((order < half)[..., None], _power(g, (half - 1 - order)[..., None]), 0.0)
    folded = _decayed(old.state, half * g) + torch.einsum(
        "bch,bchk,bchv->bhkv", weights, keys.to(dtype), values.to(dtype)
    )
    state = torch.where(fold[..., None, None], folded, old.state)
    n = torch.where(fold, n - half, n)
    start = torch.where(fold[:, 0], (old.start + half) % capacity, old.start)
    order = _order(start, capacity)
    new, held = (order >= n) & (order < n + tokens), order < n + tokens
    source = (order - n).clamp(0, tokens - 1).long()
    row = torch.arange(q.shape[0], device=q.device)[:, None]
    keys = torch.where(new[..., None, None], k[row, source], keys)
    values = torch.where(new[..., None, None], v[row, source], values)
    q_ = q.to(dtype).unflatten(2, (k.shape[2], -1)) * scale
    time = n + torch.arange(tokens, device=q.device)  # [B, T], the order of each new token
    age = time[:, :, None] - order[:, None, :]
    weights = _power(g, age[..., None]) * (held[:, None] & (age >= 0))[..., None].to(dtype)
    scores = torch.einsum("bthgk,bchk->bthgc", q_, keys.to(dtype))
    scores = scores * weights.permute(0, 1, 3, 2)[:, :, :, None]
    o = torch.einsum("bthgc,bchv->bthgv", scores, values.to(dtype))
    from_state = torch.einsum("bthgk,bhkv->bthgv", q_, state)
    o = o + from_state * _power(g, (time + 1)[..., None])[..., None, None]
    updated = (state, keys, values, start, (n[:, 0] + tokens).int())
    for pool, x, y in zip(ring, updated, old, strict=True):
        write_live_rows(pool, used, live, x, y)
    blank = torch.where(slots == -1, 0.0, float("nan")).view(-1, 1, 1, 1)
    o = o.flatten(2, 3)
    return torch.where(live.view(-1, 1, 1, 1), o, blank).to(q.dtype)


def _check_ring(ring: RingState, q: Tensor, v: Tensor, slots: Tensor | None) -> None:
    if not isinstance(ring, RingState):
        raise TypeError(
            f"ring is {type(ring).__name__}; expected a RingState; make one with "
            "RingState.from_state"
        )
    key_dim, (kv_heads, value_dim) = q.shape[-1], v.shape[-2:]
    rows = q.shape[0] if slots is None else ring.state.shape[0]
    shape = (rows, kv_heads, key_dim, value_dim)
    checks.check_shape("ring.state", ring.state, shape, "slots kv_heads key_dim value_dim")
    if ring.keys.dim() != 4:
        checks.check_rank("ring.keys", ring.keys, "slots capacity kv_heads key_dim")
    shape = (rows, ring.capacity, kv_heads, key_dim)
    checks.check_shape("ring.keys", ring.keys, shape, "slots capacity kv_heads key_dim")
    shape = (rows, ring.capacity, kv_heads, value_dim)
    checks.check_shape("ring.values", ring.values, shape, "slots capacity kv_heads value_dim")
    sums = checks.accumulation_dtype(q.dtype)
    checks.check_same("ring.state", ring.state, sums, q.device, f"the sums of {q.dtype} inputs")
    checks.check_same("ring.keys", ring.keys, q.dtype, q.device, "q")
    checks.check_same("ring.values", ring.values, q.dtype, q.device, "q")
    for name, x in (("ring.start", ring.start), ("ring.length", ring.length)):
        checks.check_shape(name, x, (rows,), "slots")
        checks.check_same(name, x, torch.int32, q.device, "a ring's places")
    tokens = 1 if q.dim() == 3 else q.shape[1]
    if 2 * tokens > ring.capacity:
        raise ValueError(
            f"tokens is {tokens}; expected at most half of the ring's capacity, which is "
            f"{ring.capacity}; make the ring larger"
        )
    for name, x in zip(ring._fields, ring, strict=True):
        strides = x.stride()
        if 0 in strides:
            check_own_rows(f"ring.{name}", x)
        if strides[-1] != 1 and name != "state" and x.shape[-1] > 1:
            raise ValueError(f"ring.{name} has stride {strides[-1]} in its last dim; expected 1")


def linear_attention_ring_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    ring: RingState,
    *,
    scale: float = 1.0,
    slots: Tensor | None = None,
) -> Tensor:
    """``linear_attention_step`` for constant decay against a ``RingState``, updated in place.

    With n entries k_j, v_j in a row's ring and lam = exp(log_decay), its new tokens being entries
    n, n + 1, ...:  o_t = scale * (lam^(n+t+1) q_t S + sum_{j <= n+t} lam^(n+t-j) (q_t . k_j) v_j).
    The same as the recurrence in exact arithmetic; sums are float32 (float64 for float64 inputs).
    A state is read once a call and written once in capacity / 2 tokens, so that at capacity 16 and
    head dim 128 a step of bfloat16 inputs moves about 1.2 states' bytes where a plain step moves 2.
    On CUDA, under the rule of ``decode_ops.runs_kernel``, two kernels do it all.

    Args:
        q: queries, [batch, heads, key_dim], or [batch, tokens, heads, key_dim] with tokens at most
            8 and at most half of the ring's capacity.
        k: keys, [batch(, tokens), kv_heads, key_dim]; kv_heads divides heads.
        v: values, [batch(, tokens), kv_heads, value_dim].
        log_decay: None or [kv_heads], at most 0, and the same at every step.
        ring: the rings, one a row of the batch, or with slots a pool of them. All its tensors may
            change.
        scale: multiplies the output.
        slots: int32 [batch], the row of the pool that each row of the batch uses; rows with -1 are
            skipped (their output is 0). Two rows may not share a slot.

    Returns:
        o, [batch(, tokens), heads, value_dim] in the inputs' dtype. On a GPU a slot outside the
        pool gives NaN; so does a row that was rolled back too far.

    Raises:
        ValueError: a shape, a ring whose rows share memory, or (CPU, eager) a log_decay that is
            NaN or positive, a slot outside the pool.
        TypeError: dtypes that differ, a ring that is no RingState.
        NotImplementedError: a log_decay per token, or inputs that need a gradient.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(name, x)
    for name, x in (("log_decay", log_decay), ("slots", slots)):
        checks.check_tensor(name, x, optional=True)
    scale = checks.check_number("scale", scale)
    checks.check_float("q", q)
    if checks.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(checks.autocast_dtype(x)) for x in (q, k, v))
    check_shapes(q, k, v)
    _check_ring(ring, q, v, slots)
    if log_decay is not None:
        _check_constant(log_decay, q.device, v.shape[-2])
    if slots is not None:
        check_slots(slots, ring.state.shape[0], q)
    if decode_ops.needs_gradient(q, k, v, log_decay, ring.state):
        raise NotImplementedError(
            "an input needs a gradient; linear_attention_ring_step has none, since it works in "
            "place; use linear_attention_step, or torch.no_grad()"
        )
    if decode_ops.runs_kernel(q, v):
        return decode_ops.ring_step(q, k, v, log_decay, *ring, slots, scale)
    single = q.dim() == 3
    if single:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    # Autocast has done its part; further in it would round the float32 sums too.
    with checks.no_autocast(q.device.type):
        o = _plain_ring_step(q, k, v, log_decay, ring, slots, scale)
    return o[:, 0] if single else o


def _check_constant(log_decay: Tensor, device: torch.device, kv_heads: int) -> None:
    if log_decay.dim() != 1:
        raise NotImplementedError(
            f"log_decay has shape {list(log_decay.shape)}; a ring needs one decay per head, "
            "[kv_heads] or None; use linear_attention_step for gated decay"
        )
    checks.check_shape("log_decay", log_decay, (kv_heads,), "kv_heads")
    if not log_decay.is_floating_point():
        raise TypeError(f"log_decay is {log_decay.dtype}; expected a floating dtype")
    if log_decay.device != device:
        raise ValueError(f"log_decay is on {log_decay.device}; expected {device}; move it")
    checks.check_log_decay_values(log_decay)
