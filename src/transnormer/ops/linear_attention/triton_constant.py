"""Lightning Attention with constant decay: the chunked form as Triton kernels.

    S_t = exp(g) S_{t-1} + k_t v_t^T;    o_t = scale * q_t S_t        (g = log_decay <= 0, per head)

Layout [batch, seq, heads, dim] with any strides but a contiguous last dim; states are
[key_dim, value_dim], float32. Source: Qin et al. 2024, arXiv:2401.04658, algorithms 1 and 2.

Everything is one *sweep* over the chunks of a unit (a segment of a sequence, see ``triton_units``)
with the state in registers. With M_ij = exp(g (i - j)) for i >= j, 0 otherwise, and C tokens in the
chunk, position i of it counting from 0:

    O = [(Q K^T) * M] V + exp(g (i + 1 - shift)) * Q S
    S = exp(g C) S + sum over j of exp(g (C - 1 - j + shift)) k_j v_j^T

A sweep holds S transposed, [value, key]: products with S are then wgmma operations whose
register operand is S itself, and nothing that was computed has to be transposed.

The backward pass is the same sweep with the roles exchanged, all in one launch. The second and
third run against the order of the first, with shift 1, since the gradient of a state that leaves
the sequence is not decayed by the token before it:

    dQ: (dO, V, K) in the order of the forward pass, on the forward state;
    dK: (V, dO, Q) and dV: (K, Q, dO) in the opposite order, on the gradient of the state.

A gate a token and head (``triton_scalar``) runs in the same kernels: the sweep (``triton_sweep``) then
makes mask and vectors of each chunk from sums of its gates.

Legend: H query heads, G query heads a kv head, T tokens of a batch row, L tokens a segment, C
tokens a chunk, D key dim and E value dim of a sweep; BD, BE their tile sizes.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_arithmetic import (
    add_to_state,
    decay_state,
    load_tile,
    power,
    split_decay,
)
from transnormer.ops.linear_attention.triton_sweep import gated_sum, gated_sweep, sweep
from transnormer.ops.linear_attention.triton_units import find_unit

# Arguments stand in lines as they belong together; one a line, they would be 400 lines.
# fmt: off

# exp(-23) = 1e-10: after so much decay, what a token added is below float32 rounding of the state.
_FORGOTTEN: tl.constexpr = tl.constexpr(23.0)


@triton.jit
def load_decay(log_decay, head, CONSTANT: tl.constexpr):
    """The head's g as a float32 scalar, 0 without decay."""
    if CONSTANT:
        return tl.load(log_decay + head).to(tl.float32)
    return 0.0


@triton.jit
def load_state(
    states, index, d_stride, e_stride, dims, values, D: tl.constexpr, E: tl.constexpr, wanted
):
    """State ``index`` of [.., key_dim, value_dim] as a tile [BE, BD]; 0 where it is not wanted."""
    at = states + index * (D * E) + dims[None, :] * d_stride + values[:, None] * e_stride
    return tl.load(at, mask=(dims[None, :] < D) & (values[:, None] < E) & wanted, other=0.0)


@triton.jit
def store_state(
    states, index, state, d_stride, e_stride, dims, values, D: tl.constexpr, E: tl.constexpr
):
    """The reverse of load_state."""
    at = states + index * (D * E) + dims[None, :] * d_stride + values[:, None] * e_stride
    tl.store(at, state, mask=(dims[None, :] < D) & (values[:, None] < E))


@triton.jit
def entered(ENTRY: tl.constexpr, begins):
    """Whether a unit reads its state: see ENTRY of forward_kernel; begins: its walk does there."""
    return (begins == 0) | (ENTRY != "later")


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS", "H", "G"])
def forward_kernel(
    q, k, v, log_decay, entry, o, final, table, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, T, L, SEGMENTS, H, G, scale, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, ENTRY: tl.constexpr,
    DECAY: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):
    """Outputs of one unit, head and slice of values; a sequence's last unit writes its final state.

    DECAY: "none", "constant", or "gates", whose sums log_decay then holds, see ``triton_scalar``.

    ENTRY: "none", or what ``entry`` holds, [.., H / G, K, V]: a state a "sequence"; a "unit"; "later", a
    unit too, but those with which a sequence's walk begins are not filled and count as zero.
    """
    SLICES: tl.constexpr = (V + BE - 1) // BE
    program = tl.program_id(0)
    first_value = (program % SLICES) * BE
    head = (program // SLICES) % H
    unit = program // (SLICES * H)
    sequence, row, start, length, first, last = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    if sequence < 0:
        return
    kv_head = (head // G).to(tl.int64)
    kv_heads = H // G
    dims = tl.arange(0, BD)
    values = first_value + tl.arange(0, BE)
    if ENTRY == "none":
        state = tl.zeros([BE, BD], dtype=tl.float32)
    else:
        index = (sequence if ENTRY == "sequence" else unit.to(tl.int64)) * kv_heads + kv_head
        enters = entered(ENTRY, last if REVERSE else first)
        state = load_state(entry, index, V, 1, dims, values, K, V, enters)
    # The order against the tensors' is a walk from the last token with negative steps.
    at, direction = start, 1
    if REVERSE:
        at, direction = start + length - 1, -1
    q_at = q + row * q_batch + at * q_token + head.to(tl.int64) * q_head
    k_at = k + row * k_batch + at * k_token + kv_head * k_head
    v_at = v + row * v_batch + at * v_token + kv_head * v_head
    o_token = tl.cast(H, tl.int64) * V
    o_at = o + (row * T + at) * o_token + head * V
    q_step, k_step = tl.cast(q_token, tl.int64) * direction, tl.cast(k_token, tl.int64) * direction
    v_step, o_step = tl.cast(v_token, tl.int64) * direction, o_token * direction
    if DECAY == "gates":
        sums = log_decay + ((row * kv_heads + kv_head) * T + at) * PARTS
        state = gated_sweep(
            q_at, k_at, v_at, o_at, q_at, sums, sums, sums, q_step, k_step, v_step, o_step, q_step,
            length, state, scale, scale, 1.0, first_value, 0, False, K, V, C, BD, BE, DTYPE,
            PRECISION, STAGES, -1 if REVERSE else 1, False, PARTS, False, False,
        )
    else:
        g = load_decay(log_decay, kv_head, DECAY == "constant")
        state = sweep(
            q_at, k_at, v_at, o_at, q_step, k_step, v_step, o_step, length, state, g, 0, scale,
            scale, 1.0, first_value, K, V, C, BD, BE, DTYPE, PRECISION, EXACT, STAGES,
        )
    ends = first if REVERSE else last
    if ends and head % G == 0:
        store_state(final, sequence * kv_heads + kv_head, state, V, 1, dims, values, K, V)


@triton.jit
def select(kind, a, b, c):
    """a, b or c for kind 0, 1 or 2; scalars."""
    return tl.where(kind == 0, a, tl.where(kind == 1, b, c))


@triton.jit(do_not_specialize=["out_heads", "T", "L", "SEGMENTS", "H", "G"])
def backward_kernel(
    q, k, v, do, log_decay, entry, grad_entry, dq, dk, dv, d_initial, d_gates, chunk_states, table,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, do_batch, do_token, do_head,
    out_heads, T, L, SEGMENTS, H, G, scale, K: tl.constexpr, V: tl.constexpr, FIRST: tl.constexpr,
    COUNT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, ENTRY: tl.constexpr, GRAD_ENTRY: tl.constexpr, D_INITIAL: tl.constexpr,
    D_GATES: tl.constexpr, DECAY: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients FIRST to FIRST + COUNT - 1 of (q, k, v), each a sweep of its own programs.

    The programs of one unit and head lie side by side: those of k and v walk the same tokens of q
    and do at the same time, so that one of them finds them in the L2 cache. k's and v's gradients
    are written for each query head. Tokens of dq, dk and dv, heads side by side, lie out_heads heads
    apart: of a multiple of E the compiler makes addresses that fit in registers. D and E are the dims
    of the sweeps: (V, K) for q's and k's, (K, V) for v's. d_initial [sequences, H, K, V] is the gradient of the initial states. GRAD_ENTRY is
    of grad_entry what ENTRY is of entry, for a walk against the order.

    With gates q's gradient is a launch of its own, after the others. D_GATES: k's writes the
    gradient of the state that leaves each chunk to chunk_states [.., H, K, V], from which q's makes
    the gates' gradient, d_gates [batch, H, SLICES, T], one share a slice.
    """
    SLICES: tl.constexpr = (E + BE - 1) // BE
    program = tl.program_id(0)
    kind = FIRST + program % COUNT
    first_value = (program // COUNT % SLICES) * BE
    head = (program // (COUNT * SLICES)) % H
    unit = program // (COUNT * SLICES * H)
    sequence, row, start, length, first, last = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    if sequence < 0:
        return
    kv_head = (head // G).to(tl.int64)
    kv_heads = H // G
    dims = tl.arange(0, BD)
    values = first_value + tl.arange(0, BE)
    # q's gradient goes with the order of the forward pass, the others against it.
    backward = (kind == 0) == REVERSE
    at, direction = start, 1
    if backward:
        at, direction = start + length - 1, -1
    query_head = head.to(tl.int64)
    q_at = q + row * q_batch + at * q_token + query_head * q_head
    k_at = k + row * k_batch + at * k_token + kv_head * k_head
    v_at = v + row * v_batch + at * v_token + kv_head * v_head
    do_at = do + row * do_batch + at * do_token + query_head * do_head
    out_at = (row * T + at) * out_heads + query_head
    q_token, k_token = (
        tl.cast(q_token, tl.int64) * direction,
        tl.cast(k_token, tl.int64) * direction,
    )
    v_token = tl.cast(v_token, tl.int64) * direction
    do_token = tl.cast(do_token, tl.int64) * direction
    # Selections, not branches: the compiler keeps what it knows of alignment, and so wide loads.
    a = select(kind, do_at, v_at, k_at)
    b = select(kind, v_at, do_at, q_at)
    c = select(kind, k_at, q_at, do_at)
    o = select(kind, dq, dk, dv) + out_at * E
    a_token = select(kind, do_token, v_token, k_token)
    b_token = select(kind, v_token, do_token, q_token)
    c_token = select(kind, k_token, q_token, do_token)
    # Where a state's entry [d, e] of the sweep lies in [K, V].
    d_stride, e_stride = 1, V
    if kind == 2:
        d_stride, e_stride = V, 1
    state = tl.zeros([BE, BD], dtype=tl.float32)
    if kind == 0:
        if ENTRY != "none":
            index = (sequence if ENTRY == "sequence" else unit.to(tl.int64)) * kv_heads + kv_head
            enters = entered(ENTRY, last if REVERSE else first)
            state = load_state(entry, index, d_stride, e_stride, dims, values, D, E, enters)
    else:
        if GRAD_ENTRY == "sequence":
            # The final state belongs to the kv head: its gradient enters once.
            index = sequence * kv_heads + kv_head
            owner = head % G == 0
            state = load_state(grad_entry, index, d_stride, e_stride, dims, values, D, E, owner)
        elif GRAD_ENTRY != "none":
            index = unit.to(tl.int64) * H + head
            enters = entered(GRAD_ENTRY, first if REVERSE else last)
            state = load_state(grad_entry, index, d_stride, e_stride, dims, values, D, E, enters)
    row_scale, key_scale, shift = scale, 1.0, 0
    if kind != 0:
        row_scale, key_scale, shift = 1.0, scale, 1
    o_token = tl.cast(out_heads, tl.int64) * E * direction
    if DECAY == "gates":
        AGAINST: tl.constexpr = FIRST > 0
        sums = log_decay + ((row * kv_heads + kv_head) * T + at) * PARTS
        first_chunk = (row * T + start) // C + unit
        at_shares, at_states = sums, sums
        if D_GATES:
            at_shares = d_gates + ((row * H + head) * SLICES + program // COUNT % SLICES) * T + at
            at_states = chunk_states + (first_chunk * H + head) * (K * V)
        state = gated_sweep(
            a, b, c, o, q_at, at_shares, at_states, sums, a_token, b_token, c_token, o_token,
            q_token, length, state, scale, row_scale, key_scale, first_value,
            tl.cast(H, tl.int64) * (K * V), kind == 1, D, E, C, BD, BE, DTYPE, PRECISION, STAGES,
            -1 if REVERSE != AGAINST else 1, AGAINST, PARTS, D_GATES and AGAINST,
            D_GATES and not AGAINST,
        )
    else:
        g = load_decay(log_decay, kv_head, DECAY == "constant")
        state = sweep(
            a, b, c, o, a_token, b_token, c_token, o_token, length, state, g, shift, scale,
            row_scale, key_scale, first_value, D, E, C, BD, BE, DTYPE, PRECISION, EXACT, STAGES,
        )
    if D_INITIAL:
        begins = last if REVERSE else first
        if begins and kind == FIRST + COUNT - 1:
            index = sequence * H + head
            store_state(d_initial, index, state, d_stride, e_stride, dims, values, D, E)


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS", "H", "G"])
def local_state_kernel(
    k, v, log_decay, states, decays, table, k_batch, k_token, k_head, v_batch, v_token, v_head, T, L,
    SEGMENTS, H, G, scale, PIECES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, SHIFT: tl.constexpr, DECAY: tl.constexpr,
    PARTS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
):
    """What each unit adds to the state: sum of exp(g * distance) scale k_j v_j^T, [units, H, K, V].

    Only the last tokens count, as many as float32 can still see behind their decay; a piece that
    has none of them in its unit is left out. The unit at which the walk ends (its PIECES, see
    carry_kernel) is left out too, but with WHOLE: no other one needs it. k and v
    have H heads; the log_decay of head h is at h // G. With gates all tokens are read, and what
    decays a state on its way through the unit is written too, its log in decays [units, H].
    """
    SLICES: tl.constexpr = (V + BE - 1) // BE
    program = tl.program_id(0)
    head = (program // SLICES) % H
    unit = program // (SLICES * H)
    sequence, row, start, length, first, last = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    if sequence < 0:
        return
    if PACKED:
        ends = first if REVERSE else last
    elif REVERSE:
        ends = unit % SEGMENTS < PIECES
    else:
        ends = unit % SEGMENTS >= SEGMENTS - PIECES
    if ends and not WHOLE:
        return
    rows, dims = tl.arange(0, C), tl.arange(0, BD)
    values = (program % SLICES) * BE + tl.arange(0, BE)
    at, direction = start, 1
    if REVERSE:
        at, direction = start + length - 1, -1
    index = unit.to(tl.int64) * H + head
    k_token, v_token = tl.cast(k_token, tl.int64), tl.cast(v_token, tl.int64)
    k += row * k_batch + at * k_token + head.to(tl.int64) * k_head
    v += row * v_batch + at * v_token + head.to(tl.int64) * v_head
    k_token, v_token = k_token * direction, v_token * direction
    if DECAY == "gates":
        sums = log_decay + ((row * (H // G) + head // G) * T + at) * PARTS
        state, total = gated_sum(
            k, v, sums, k_token, v_token, length, scale, dims, values, K, V, C, BD, BE, DTYPE,
            PRECISION, STAGES, -1 if REVERSE else 1, SHIFT == 1, PARTS,
        )
        store_state(states, index, state, V, 1, dims, values, K, V)
        tl.store(decays + index, total, mask=program % SLICES == 0)
        return
    g = load_decay(log_decay, head // G, DECAY == "constant")
    if PIECES > 1:
        # Tokens between the piece and its unit's end.
        before = (unit % PIECES) * L
        behind = tl.minimum((PIECES - 1) * L - before, tl.maximum(T - start - length, 0))
        if REVERSE:
            behind = tl.minimum(before, tl.maximum(T - start + before, 0))
        if (behind > 0) & (g * tl.maximum(behind, 1).to(tl.float32) < -_FORGOTTEN):
            return
    # The first chunk that is not forgotten at the unit's end.
    window = tl.maximum(length, 1).to(tl.float32)
    if g * window < -_FORGOTTEN:
        window = _FORGOTTEN / -g
    skipped = tl.maximum(length - window.to(tl.int64) - 1, 0) // C
    length -= skipped * C
    k_tile = k + skipped * C * k_token + rows[:, None] * k_token + dims[None, :]
    v_tile = v + skipped * C * v_token + values[:, None] + rows[None, :] * v_token
    weight = power(g, C - 1 - rows)
    faint = power(g, SHIFT) * scale
    kept, rest = split_decay(g * C)
    MASK_D: tl.constexpr = K != BD
    MASK_E: tl.constexpr = V % BE != 0
    state = tl.zeros([BE, BD], dtype=tl.float32)
    full = length // C
    for c in tl.range(0, full, num_stages=STAGES):
        at = c * C
        k_ = load_tile(k_tile + at * k_token, True, dims[None, :] < K, False, MASK_D, DTYPE)
        v_ = load_tile(v_tile + at * v_token, True, values[:, None] < V, False, MASK_E, DTYPE)
        state = decay_state(state, kept, rest, EXACT)
        state = add_to_state(state, k_, v_, weight, faint, DTYPE, PRECISION)
    left = (length - full * C).to(tl.int32)
    if left > 0:
        at = full * C
        weight = tl.where(rows < left, power(g, left - 1 - rows), 0.0)
        kept, rest = split_decay(g * left)
        inside, here = rows[:, None] < left, rows[None, :] < left
        k_ = load_tile(k_tile + at * k_token, inside, dims[None, :] < K, True, MASK_D, DTYPE)
        v_ = load_tile(v_tile + at * v_token, here, values[:, None] < V, True, MASK_E, DTYPE)
        state = decay_state(state, kept, rest, EXACT)
        state = add_to_state(state, k_, v_, weight, faint, DTYPE, PRECISION)
    store_state(states, index, state, V, 1, dims, values, K, V)


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS", "H", "G", "INITIAL_GROUP"])
def carry_kernel(
    added, entry, initial, log_decay, decays, first_unit, table,
    T, L, SEGMENTS, H, G, INITIAL_GROUP, PIECES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, INITIAL: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, TOTAL: tl.constexpr,
):
    """From what pieces of units add to the states that enter the units, [units, H, K, V].

    ``added`` has PIECES pieces a unit, of L tokens each, since a sum over a short piece is soon
    done. A program has BLOCK entries of one sequence's and head's states. ``initial`` [sequences,
    H / INITIAL_GROUP, K, V] enters at the first head of each group; without it the unit at which the
    walk begins is not written. TOTAL: not the states that enter units, but the one that leaves each
    sequence, [sequences, H, K, V]; then ``added`` has all units.
    """
    BLOCKS: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    entries = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < K * V
    head = (program // BLOCKS) % H
    sequence = (program // (BLOCKS * H)).to(tl.int64)
    if PACKED:
        begin = tl.load(first_unit + sequence)
        count = tl.load(first_unit + sequence + 1) - begin
    else:
        begin = sequence * (SEGMENTS // PIECES)
        count = tl.cast(SEGMENTS // PIECES, tl.int64)
    g = load_decay(log_decay, head // G, DECAY == "constant")
    carry = tl.zeros([BLOCK], dtype=tl.float32)
    if INITIAL:
        index = sequence * (H // INITIAL_GROUP) + head // INITIAL_GROUP
        owner = inside & (head % INITIAL_GROUP == 0)
        carry = tl.load(initial + index * (K * V) + entries, mask=owner, other=0.0)
    pieces = tl.arange(0, PIECES)
    # Of pieces [q, p]: q comes between p and the unit's end.
    between = pieces[:, None] > pieces[None, :]
    if REVERSE:
        between = pieces[:, None] < pieces[None, :]
    # All pieces of the units ahead are under way at once: a wait for each would be the whole time.
    for i in tl.range(0, count, num_stages=3):
        j = i
        if REVERSE:
            j = count - 1 - i
        unit = begin + j
        at = (unit * PIECES + pieces) * H + head
        wanted = ((i < count - 1) | TOTAL) & (pieces >= 0)
        if DECAY == "gates":
            own = tl.load(decays + at, mask=wanted, other=0.0)
        else:
            if PACKED:
                size = tl.load(table + unit * 4 + 2) + 0 * pieces
            else:
                size = tl.minimum(tl.maximum(T - (j * PIECES + pieces) * L, 0), L)
            own = tl.where(size > 0, g * tl.maximum(size, 1).to(tl.float32), 0.0)
        behind = tl.sum(tl.where(between, own[:, None], 0.0), 0)
        # What was left out was not written: the unit at which the walk ends, and (the margin is for
        # rounding) forgotten pieces.
        if DECAY == "constant":
            wanted = wanted & (behind > -0.99 * _FORGOTTEN)
        new = tl.load(
            added + at[:, None] * (K * V) + entries[None, :],
            mask=inside[None, :] & wanted[:, None], other=0.0,
        )
        if not TOTAL:
            given = inside & ((i > 0) | INITIAL)
            tl.store(entry + (unit * H + head) * (K * V) + entries, carry, mask=given)
        kept, rest = split_decay(tl.sum(own, 0))
        carry = carry * kept + carry * rest + tl.sum(new * tl.exp(behind)[:, None], 0)
    if TOTAL:
        tl.store(entry + (sequence * H + head) * (K * V) + entries, carry, mask=inside)
