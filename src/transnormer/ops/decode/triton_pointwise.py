"""What lies between the products of a decoding step, one kernel each: all but the products.

    begin      x = embedding[id] * scale;  position = positions[slot], which goes on by the tokens
    add_norm   x = x + y;  n = x / sqrt(mean(x^2) + eps)
    mix        q, k = lrpe(act(q)), lrpe(act(k));  S = exp(g) S + k v^T;  o = q S, in its slot of a pool
    queries    the first line of mix alone, for more tokens and for rings
    norm_gate  o / sqrt(mean(o^2) + eps) * act(u)
    product    act(g) * u
    best       the likeliest token of each row

Sums and arithmetic are float32; results are rounded to the activations' dtype where the model in
PyTorch rounds them. Source: Qin et al. 2023, arXiv:2307.14995, section 3.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.decode.triton_launch import (
    activated,
    let_next_begin,
    number_of,
    run,
    wait_for_inputs,
)
from transnormer.ops.linear_attention.launch_config import block_of
from transnormer.ops.linear_attention.ring import RingState
from transnormer.ops.linear_attention.triton_arithmetic import split_decay
from transnormer.ops.linear_attention.triton_step import configuration
from transnormer.ops.lrpe.triton_lrpe import turn

# Entries of a row of logits that a program looks through.
_SCAN = 4096
# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit
def rounded(x, like):
    """x as the dtype that ``like`` points to holds it, in float32."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["num_slots"])
def begin_kernel(
    ids, slots, table, positions, x, where, scale, num_slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):
    """A row and token: its embedding and its position, which goes on where a row has one token."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    program = tl.program_id(0)
    row, token = program // TOKENS, program % TOKENS
    slot = tl.load(slots + row).to(tl.int64)
    known = (slot >= 0) & (slot < num_slots)
    start = tl.load(positions + slot, mask=known, other=0)
    tl.store(where + program, tl.where(known, start + token, 0))
    if TOKENS == 1:
        tl.store(positions + slot, start + 1, mask=known)
    source = table + tl.load(ids + program).to(tl.int64) * D
    columns = tl.arange(0, BLOCK_D)
    value = tl.load(source + columns, mask=columns < D, other=0.0).to(tl.float32) * scale
    tl.store(x + program.to(tl.int64) * D + columns, value.to(x.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["num_slots"])
def move_on_kernel(
    slots, positions, rows, tokens, num_slots, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """Positions of the slots go on by several tokens, whose programs have all read them."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    row = tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < rows, other=-1).to(tl.int64)
    live = (slot >= 0) & (slot < num_slots)
    start = tl.load(positions + slot, mask=live, other=0)
    tl.store(positions + slot, start + tokens, mask=live)


@triton.jit
def add_norm_kernel(
    x, y, made, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """One row."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    columns = tl.arange(0, BLOCK_D)
    inside, at = columns < D, tl.program_id(0).to(tl.int64) * D + columns
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = rounded(value + tl.load(y + at, mask=inside, other=0.0).to(tl.float32), x)
        tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(made + at, (value * factor).to(made.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_slots"])
def norm_gate_kernel(
    o, u, made, u_row, eps, start, length, slots, num_slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACTIVATION: tl.constexpr, C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row; u_row is the stride of u's rows. With C entries of a ring it takes up a token."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    columns, row = tl.arange(0, BLOCK_D), tl.program_id(0).to(tl.int64)
    if C > 0:
        slot = tl.load(slots + row).to(tl.int64)
        known = (slot >= 0) & (slot < num_slots)
        n = tl.load(length + slot, mask=known, other=-1)
        first = tl.load(start + slot, mask=known, other=0)
        folds = n + 1 > C
        # Every warp has read the old length before one of them replaces it.
        tl.debug_barrier()
        tl.store(start + slot, tl.where(folds, (first + C // 2) % C, first), mask=n >= 0)
        tl.store(length + slot, tl.where(folds, n - C // 2, n) + 1, mask=n >= 0)
    inside = columns < D
    value = tl.load(o + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    gate = tl.load(u + row * u_row + columns, mask=inside, other=0.0).to(tl.float32)
    gate = rounded(activated(gate, ACTIVATION), made)
    value = rounded(value * factor, made) * gate
    tl.store(made + row * D + columns, value.to(made.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    g, u, made, size, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr
):
    """BLOCK entries."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(g + at, mask=at < size, other=0.0).to(tl.float32)
    value = rounded(activated(value, ACTIVATION), made)
    value *= tl.load(u + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(made + at, value.to(made.dtype.element_ty), mask=at < size)


@triton.jit
def turned(
    x, theta, position, channels,
    ACTIVATION: tl.constexpr, LRPE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Channels of an activated query or key at x, cosine halves first where LRPE is."""
    own = channels % HEAD_DIM
    inside = channels < (2 * HEAD_DIM if LRPE else HEAD_DIM)
    value = tl.load(x + own, mask=inside, other=0.0).to(tl.float32)
    # A sigmoid of nothing is not 0.
    value = tl.where(inside, rounded(activated(value, ACTIVATION), x), 0.0)
    if LRPE:
        frequencies = tl.load(theta + own, mask=inside, other=0.0)
        cos, sin = turn(position + tl.zeros([1], tl.int64), frequencies)
        factor = tl.where((channels >= HEAD_DIM)[None, :], sin, cos)
        value = rounded(value * tl.sum(factor, 0), x)
    return value


@triton.jit(do_not_specialize=["num_slots"])
def mix_kernel(
    qkvu, where, theta, log_decay, state, slots, o, num_slots, row_stride,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACTIVATION: tl.constexpr, V_ACTIVATION: tl.constexpr,
    LRPE: tl.constexpr, DECAY: tl.constexpr, OVERLAP: tl.constexpr,
):
    """A row, a head and BLOCK_V columns of its state, which crosses the memory bus twice."""
    SLICES: tl.constexpr = (HEAD_DIM + BLOCK_V - 1) // BLOCK_V
    EVEN: tl.constexpr = (KEY_DIM == BLOCK_K) and (HEAD_DIM % BLOCK_V == 0)
    let_next_begin(OVERLAP)
    program = tl.program_id(0)
    b = (program // (H * SLICES)).to(tl.int64)
    h = ((program // SLICES) % H).to(tl.int64)
    channels = tl.arange(0, BLOCK_K)
    columns = (program % SLICES) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = columns < HEAD_DIM
    slot = tl.load(slots + b).to(tl.int64)
    live = (slot >= 0) & (slot < num_slots)
    target = state + (tl.where(live, slot, 0) * H + h) * KEY_DIM * HEAD_DIM
    target += channels[:, None] * HEAD_DIM + columns[None, :]
    inside = (channels < KEY_DIM)[:, None] & in_v[None, :] & live
    # Whole tiles are read in 16-byte loads; of a row that is not real too, to no effect.
    s = tl.load(target) if EVEN else tl.load(target, mask=inside, other=0.0)
    kept, rest = 1.0, 0.0
    if DECAY:
        kept, rest = split_decay(tl.load(log_decay + h))
    wait_for_inputs(OVERLAP)
    position = tl.load(where + b)
    source = qkvu + b * row_stride + h * HEAD_DIM
    theta += h * HEAD_DIM
    k = turned(source + H * HEAD_DIM, theta, position, channels, ACTIVATION, LRPE, HEAD_DIM, BLOCK_K)
    q = turned(source, theta, position, channels, ACTIVATION, LRPE, HEAD_DIM, BLOCK_K)
    v = tl.load(source + 2 * H * HEAD_DIM + columns, mask=in_v, other=0.0).to(tl.float32)
    v = rounded(activated(v, V_ACTIVATION), qkvu)
    added = k[:, None] * v[None, :]
    s = (added + s * rest) + s * kept
    out = tl.where(live, tl.sum(q[:, None] * s, 0), 0.0)
    # A slot outside the pool has to show.
    out = tl.where((slot < -1) | (slot >= num_slots), float("nan"), out)
    tl.store(o + (b * H + h) * HEAD_DIM + columns, out.to(o.dtype.element_ty), mask=in_v)
    tl.store(target, s, mask=inside)


@triton.jit
def queries_kernel(
    qkvu, where, theta, q, k, v, row_stride,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr, V_ACTIVATION: tl.constexpr, LRPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A token's head."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    program = tl.program_id(0)
    b, h = (program // H).to(tl.int64), (program % H).to(tl.int64)
    channels = tl.arange(0, BLOCK_K)
    position = tl.load(where + b)
    source = qkvu + b * row_stride + h * HEAD_DIM
    theta += h * HEAD_DIM
    to = (b * H + h) * KEY_DIM + channels
    x = turned(source, theta, position, channels, ACTIVATION, LRPE, HEAD_DIM, BLOCK_K)
    tl.store(q + to, x.to(q.dtype.element_ty), mask=channels < KEY_DIM)
    source += H * HEAD_DIM
    x = turned(source, theta, position, channels, ACTIVATION, LRPE, HEAD_DIM, BLOCK_K)
    tl.store(k + to, x.to(k.dtype.element_ty), mask=channels < KEY_DIM)
    inside = channels < HEAD_DIM
    x = tl.load(source + H * HEAD_DIM + channels, mask=inside, other=0.0).to(tl.float32)
    x = activated(x, V_ACTIVATION).to(v.dtype.element_ty)
    tl.store(v + (b * H + h) * HEAD_DIM + channels, x, mask=inside)


@triton.jit
def scan_kernel(
    logits, tops, places, size, limit, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The largest of BLOCK logits of a row and where it is; NaN where one of them is."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    program = tl.program_id(0)
    at = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)
    row = (program // PARTS).to(tl.int64)
    x = tl.load(logits + row * size + at, mask=at < limit, other=float("-inf")).to(tl.float32)
    bad = tl.max((x != x).to(tl.int32), 0) > 0
    top, place = tl.max(tl.where(x == x, x, float("-inf")), 0, return_indices=True)
    tl.store(tops + program, tl.where(bad, float("nan"), top))
    tl.store(places + program, (program % PARTS) * BLOCK + place)


@triton.jit
def best_kernel(
    tops, places, best, rows, PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """A row's token, and whether its largest logit is NaN or infinite."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    row, part = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(tops + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    bad = tl.max((x != x).to(tl.int32), 0) > 0
    top, at = tl.max(tl.where(x == x, x, float("-inf")), 0, return_indices=True)
    tl.store(best + row, tl.load(places + row * PARTS + at).to(tl.int64))
    bad = bad | (top == float("-inf")) | (top == float("inf"))
    tl.store(best + rows + row, bad.to(tl.int64))


def begin(
    ids: Tensor, slots: Tensor, table: Tensor, positions: Tensor, scale: float, *, overlap: bool
) -> tuple[Tensor, Tensor]:
    """Embedded tokens and their positions; ``positions`` of the slots go on by the tokens.

    Args:
        ids: int32 or int64 [rows, tokens].
        slots: int32 [rows], -1 for rows that are not real.
        table: [vocab_size, model_dim].
        positions: int64 [slots].
        scale: of the embeddings.
        overlap: as ``projection``'s, of this and all others.

    Returns:
        x [rows * tokens, model_dim] and positions, int64 [rows * tokens].
    """
    rows, tokens = ids.shape
    width = table.shape[1]
    x = table.new_empty(rows * tokens, width)
    where = positions.new_empty(rows * tokens)
    run(
        begin_kernel, rows * tokens, x, ids, slots, table, positions, x, where, scale,
        len(positions), D=width, BLOCK_D=block_of(width), TOKENS=tokens, overlap=overlap, num_warps=4,
    )
    if tokens > 1:
        run(
            move_on_kernel, 1, x, slots, positions, rows, tokens, len(positions),
            BLOCK=block_of(rows), overlap=overlap, num_warps=4,
        )
    return x, where


def add_norm(x: Tensor, y: Tensor | None, eps: float, *, overlap: bool) -> Tensor:
    """x + y normed, [rows, dim]; the sum replaces x, which is contiguous."""
    rows, width = x.shape
    made = torch.empty_like(x)
    run(
        add_norm_kernel, rows, x, x, x if y is None else y.contiguous(), made, eps, D=width,
        BLOCK_D=block_of(width), ADD=y is not None, overlap=overlap, num_warps=4,
    )
    return made


def norm_gate(
    o: Tensor,
    u: Tensor,
    eps: float,
    activation: str,
    *,
    overlap: bool,
    ring: RingState | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """o normed times act(u), [rows, dim]; u has a contiguous last dim.

    Args:
        o, u, eps, activation, overlap: as everywhere.
        ring: rings into which ``triton_ring_mix`` has put a token of each row; their start and
            length are moved on.
        slots: int32 [rows], those of the rows; -1 is none.
    """
    rows, width = o.shape
    made = torch.empty_like(o)
    places = (o, o, o) if ring is None or slots is None else (ring.start, ring.length, slots)
    run(
        norm_gate_kernel, rows, o, o, u, made, u.stride(0), eps, *places,
        0 if ring is None else len(ring.length), D=width, BLOCK_D=block_of(width),
        ACTIVATION=number_of(activation), C=0 if ring is None else ring.capacity, overlap=overlap,
        num_warps=4,
    )
    return made


def product(g: Tensor, u: Tensor, activation: str, *, overlap: bool) -> Tensor:
    """act(g) * u; the result replaces g where that is contiguous."""
    # Products of padded weights end in columns that were cut off.
    g, u = g.contiguous(), u.contiguous()
    run(
        product_kernel, -(-g.numel() // 1024), g, g, u, g, g.numel(), BLOCK=1024,
        ACTIVATION=number_of(activation), overlap=overlap, num_warps=4,
    )
    return g


def mix(
    qkvu: Tensor,
    where: Tensor,
    theta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    slots: Tensor,
    heads: int,
    activation: str,
    v_activation: str,
    *,
    overlap: bool,
) -> Tensor:
    """A token of each row against its state, which is advanced in place.

    Args:
        qkvu: [rows, 3 or 4 times heads * head_dim] with a contiguous last dim.
        where: int64 [rows], positions.
        theta: [heads, head_dim] of LRPE in its doubled form, or None.
        log_decay: float32 [heads], or None.
        state: pool [slots, heads, key_dim, head_dim], float32, contiguous.
        slots: int32 [rows]; -1 skips a row, whose output is 0.
        heads: number of heads.
        activation: of q and k.
        v_activation: of v.
        overlap: as everywhere.

    Returns:
        o, [rows, heads * head_dim].
    """
    rows, (key_dim, head_dim) = qkvu.shape[0], state.shape[2:]
    o = qkvu.new_empty(rows, heads * head_dim)
    columns, warps = configuration(key_dim, head_dim, rows * heads)
    # Measured at 128 x 128: 4 warps take 1.03 to 1.22 of the bytes' time, 8 take 1.24 to 1.50.
    warps = min(warps, 4)
    run(
        mix_kernel, rows * heads * -(-head_dim // columns), o, qkvu, where,
        where if theta is None else theta, where if log_decay is None else log_decay, state, slots,
        o, state.shape[0], qkvu.stride(0), H=heads, HEAD_DIM=head_dim, KEY_DIM=key_dim,
        BLOCK_K=block_of(key_dim), BLOCK_V=columns, ACTIVATION=number_of(activation),
        V_ACTIVATION=number_of(v_activation), LRPE=theta is not None,
        DECAY=log_decay is not None, overlap=overlap, num_warps=warps,
    )
    return o


def queries(
    qkvu: Tensor,
    where: Tensor,
    theta: Tensor | None,
    heads: int,
    head_dim: int,
    activation: str,
    v_activation: str,
    *,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the state reads them, [rows, heads, key_dim or head_dim]; see ``mix``."""
    rows, key_dim = qkvu.shape[0], head_dim * (1 if theta is None else 2)
    q, k = (qkvu.new_empty(rows, heads, key_dim) for _ in range(2))
    v = qkvu.new_empty(rows, heads, head_dim)
    run(
        queries_kernel, rows * heads, q, qkvu, where, where if theta is None else theta, q, k, v,
        qkvu.stride(0), H=heads, HEAD_DIM=head_dim, KEY_DIM=key_dim, BLOCK_K=block_of(key_dim),
        ACTIVATION=number_of(activation), V_ACTIVATION=number_of(v_activation),
        LRPE=theta is not None, overlap=overlap, num_warps=1,
    )
    return q, k, v


def best(logits: Tensor, limit: int | None, *, overlap: bool) -> Tensor:
    """The likeliest token of each row below a limit, and whether its largest logit is NaN or
    infinite: int64 [2, rows] of contiguous logits [rows, vocab_size]."""
    rows, size = logits.shape
    parts = -(-size // _SCAN)
    tops = logits.new_empty(rows, parts, dtype=torch.float32)
    places = logits.new_empty(rows, parts, dtype=torch.int32)
    made = logits.new_empty(2, rows, dtype=torch.int64)
    run(
        scan_kernel, rows * parts, logits, logits, tops, places, size,
        size if limit is None else min(limit, size), PARTS=parts, BLOCK=_SCAN, overlap=overlap,
        num_warps=4,
    )
    run(
        best_kernel, rows, logits, tops, places, made, rows, PARTS=parts, BLOCK=block_of(parts),
        overlap=overlap, num_warps=1,
    )
    return made
