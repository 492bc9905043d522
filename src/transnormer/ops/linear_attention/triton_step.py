"""The decode step as one kernel: 1 to 8 tokens against a state that is read and written once.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T;  o_t = scale * q_t S_t,  log_decay_t <= 0

Layout: q [B, T, H * G, K], k [B, T, H, K], v [B, T, H, V] with a contiguous last dim and any other
strides; state [rows, H, K, V] float32 with any strides; o [B, T, H * G, V] contiguous. A program
owns one kv head of one row and BLOCK_V columns of its state, holds them in registers over all
tokens, and serves the G query heads of the kv head, so the state crosses the memory bus twice in
all. Everything is float32 multiplies and adds: at one multiply-add per 8 bytes of state there is
nothing for tensor cores to win. Source: Qin et al. 2024, arXiv:2401.04658 (the recurrent form).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.launch_config import block_of
from transnormer.ops.linear_attention.triton_arithmetic import split_decay
from transnormer.ops.linear_attention.triton_runtime import device_of, launch

NO_DECAY, CONSTANT, PER_TOKEN, PER_KEY = range(4)


class Configuration(NamedTuple):
    """How the state of one kv head is cut into programs: columns of each, warps of each."""

    columns: int
    num_warps: int


@functools.lru_cache(maxsize=1024)
def configuration(key_dim: int, value_dim: int, states: int) -> Configuration:
    """The cut for ``states`` = batch * kv_heads states of [key_dim, value_dim].

    8,192 entries a program and 32 a thread: eight 16-byte loads in flight per thread and about 60
    registers, so a few programs of 8 warps share an SM, which keeps over 100 KiB of reads in flight
    where bandwidth times latency asks for some 18 KiB; one program's writes then overlap the reads
    of the others. Measured on an H100 (128 x 128, batch 256, 32 heads): 64 columns 366 us, 32
    columns 382, 16 columns 422. Where so few states exist that the chip would idle, programs get
    narrower, down to one 32-byte sector a row.
    """
    rows = block_of(key_dim, 1)
    columns = min(max(8192 // rows, 32), max(block_of(value_dim, 1), 8))
    while columns > 8 and states * triton.cdiv(value_dim, columns) < 132:
        columns //= 2
    return Configuration(columns, min(max(rows * columns // 1024, 1), 8))


@triton.jit(
    do_not_specialize=[
        "num_slots", "q_row", "q_token", "q_head", "k_row", "k_token", "k_head",
        "v_row", "v_token", "v_head", "g_row", "g_token", "g_head", "g_key",
    ]
)  # fmt: skip
def step_kernel(
    q, k, v, g, state, new_state, slots, o, scale, num_slots,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    g_row, g_token, g_head, g_key, state_row, state_head, new_row, new_head,
    STATE_K: tl.constexpr, STATE_V: tl.constexpr, NEW_K: tl.constexpr, NEW_V: tl.constexpr,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DECAY: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """One program: row b, kv head h, BLOCK_V columns. x_row and the like are strides of x.

    T tokens, H kv heads, G query heads each, K key_dim, V value_dim; STATE_K and STATE_V are
    strides too, known at compile time so that loads are 16 bytes wide where memory allows it.
    """
    SLICES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    EVEN: tl.constexpr = (K == BLOCK_K) and (V % BLOCK_V == 0)
    program = tl.program_id(0)
    b = (program // (H * SLICES)).to(tl.int64)
    h = ((program // SLICES) % H).to(tl.int64)
    rows = tl.arange(0, BLOCK_K)
    columns = (program % SLICES) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = rows < K, columns < V
    o += (b * T * H + h) * G * V + columns
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
        if (slot < 0) | (slot >= num_slots):
            # -1 is skipped; any other slot outside the pool has to show, and must not be touched.
            blank = tl.zeros([BLOCK_V], tl.float32) + tl.where(slot == -1, 0.0, float("nan"))
            for t in tl.static_range(T):
                for i in range(G):
                    tl.store(o + (t * H * G + i) * V, blank, mask=in_v)
            return
    source = state + slot * state_row + h * state_head
    source += rows[:, None] * STATE_K + columns[None, :] * STATE_V
    inside = in_k[:, None] & in_v[None, :]
    s = tl.load(source) if EVEN else tl.load(source, mask=inside, other=0.0)
    q += b * q_row + h * G * q_head + rows
    k += b * k_row + h * k_head + rows
    v += b * v_row + h * v_head + columns
    g += b * g_row + h * g_head
    y = tl.load(v, mask=in_v, other=0.0)
    if DECAY == 3:
        g += rows * g_key
    if DECAY != 0:
        gate = tl.load(g, mask=in_k, other=0.0) if DECAY == 3 else tl.load(g)
    query = tl.load(q, mask=in_k, other=0.0)
    x = tl.load(k, mask=in_k, other=0.0)
    for t in tl.static_range(T):
        added = x.to(tl.float32)[:, None] * y.to(tl.float32)[None, :]
        if DECAY == 0:
            s += added
        else:
            kept, rest = split_decay(gate.to(tl.float32))
            if DECAY == 3:
                kept, rest = kept[:, None], rest[:, None]
            s = (added + s * rest) + s * kept
        # What comes next is on its way before an output is written.
        if t + 1 < T:
            y = tl.load(v + (t + 1) * v_token, mask=in_v, other=0.0)
            if DECAY == 2:
                gate = tl.load(g + (t + 1) * g_token)
            if DECAY == 3:
                gate = tl.load(g + (t + 1) * g_token, mask=in_k, other=0.0)
            x = tl.load(k + (t + 1) * k_token, mask=in_k, other=0.0)
        for i in range(G):
            u = query.to(tl.float32)
            ahead = tl.where(i + 1 < G, (i + 1) * q_head, q_token)
            more = (i + 1 < G) | (t + 1 < T)
            query = tl.load(q + ahead, mask=in_k & more, other=0.0)
            out = tl.sum(u[:, None] * s, 0) * scale
            tl.store(o + (t * H * G + i) * V, out.to(o.dtype.element_ty), mask=in_v)
        q += q_token
    target = new_state + slot * new_row + h * new_head
    target += rows[:, None] * NEW_K + columns[None, :] * NEW_V
    if EVEN:
        tl.store(target, s)
    else:
        tl.store(target, s, mask=inside)


def rows_of(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x with a contiguous last dim, and its strides over batch, tokens (0 if none) and heads."""
    strides = x.stride()
    if strides[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    return x, (strides[0], 0, strides[1]) if len(strides) == 3 else strides[:3]


def gates_of(log_decay: Tensor | None, single: bool) -> tuple[int, tuple[int, ...]]:
    """The form of log_decay, and its strides over batch, tokens, heads and key_dim."""
    if log_decay is None:
        return NO_DECAY, (0, 0, 0, 0)
    strides = log_decay.stride()
    if len(strides) == 1:
        return CONSTANT, (0, 0, strides[0], 0)
    if single:
        strides = (strides[0], 0, *strides[1:])
    return (PER_TOKEN, (*strides, 0)) if len(strides) == 3 else (PER_KEY, strides)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    new_state: Tensor,
    slots: Tensor | None,
    scale: float,
    cut: Configuration | None = None,
) -> Tensor:
    """Launch the step: returns o, [batch(, tokens), heads, value_dim], and writes new_state.

    Arguments are those of ``linear_attention_step``, its checks already made. new_state may be
    state itself. cut overrides ``configuration``.
    """
    *lead, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[-2:]
    batch, single = lead[0], len(lead) == 1
    o = torch.empty((*lead, heads, value_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return o
    columns, num_warps = cut or configuration(key_dim, value_dim, batch * kv_heads)
    q, q_strides = rows_of(q)
    k, k_strides = rows_of(k)
    v, v_strides = rows_of(v)
    slots = None if slots is None else slots.contiguous()
    decay, gates = gates_of(log_decay, single)
    state_row, state_head, state_k, state_v = state.stride()
    new_row, new_head, new_k, new_v = new_state.stride()
    with device_of(q):
        launch(
            step_kernel, batch * kv_heads * -(-value_dim // columns),
            q, k, v, q if log_decay is None else log_decay, state, new_state,
            q if slots is None else slots, o, scale, state.shape[0],
            *q_strides, *k_strides, *v_strides, *gates, state_row, state_head, new_row, new_head,
            STATE_K=state_k, STATE_V=state_v, NEW_K=new_k, NEW_V=new_v,
            T=1 if single else lead[1], H=kv_heads, G=heads // kv_heads, K=key_dim, V=value_dim,
            BLOCK_K=block_of(key_dim, 1), BLOCK_V=columns, DECAY=decay, HAS_SLOTS=slots is not None,
            num_warps=num_warps,
        )  # fmt: skip
    return o
