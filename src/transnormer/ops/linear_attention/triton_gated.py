"""Linear attention with gates: scores and decayed tokens of chunks, and sweeps over them, in Triton.

    S_t = exp(g_t) * S_{t-1} + k_t v_t^T;    o_t = scale * q_t S_t        (g_t = log_decay <= 0)

g_t is a vector [key_dim], which decays the rows of S (key gate); for a number a head see
``triton_scalar``.
Layout [batch, seq, heads, dim] with any strides but a contiguous last dim; states are
[key_dim, value_dim], float32. Sources: Yang et al. 2024, arXiv:2312.06635, section 4 (chunks);
Qin et al. 2024, arXiv:2404.07904 (HGRN2).

A chunk of C tokens, in the order of the scan from 0, with f the decay of its first token:

    scores[t, s] = sum over d of q_t[d] k_s[d] exp(g_{s+1} + .. + g_t)[d]      (s <= t)
    entering[t] = q_t exp(g_1 + .. + g_t)      leaving[s] = k_s exp(g_{s+1} + .. + g_{C-1})
    o = scale * (scores v + entering (f * S));     S = exp(g_0 + .. + g_{C-1}) * S + leaving^T v

``gates_kernel`` makes scores, entering and leaving of all chunks at once, ``sweep_kernel`` walks the
chunks. f is kept apart because a float16 would lose it: the first row of ``entering`` and the last
one of ``leaving`` are q and k themselves.

The score of a pair is one of q_t exp(c_t - c_m) and k_s exp(c_m - c_s), c the sums of the gates up
to a token and m the middle of the chunk. That is exact, and a single product for all pairs, as long
as neither factor leaves the range of its dtype: no token decays further than by 2^-LIMIT from the
middle (the chunk is *near*). Else chunks are cut into the largest blocks in which that holds, down to single
tokens, and the pairs of different blocks take levels:

With a boundary between s and t a score is the product of q_t decayed from the boundary on and k_s
decayed up to it, whatever the decay. So chunks are halved, their halves halved and so on: at level l
the tokens whose bit l is set are the right halves of blocks of 2^(l+1) tokens. One product of each
level's tokens with themselves,

    u_t = q_t exp(sum from the boundary to t)  (right),    u_s = k_s exp(sum after s)  (left),

holds the scores of all pairs whose highest different bit is l. Nothing is divided, no difference is
taken, all exponents are sums of some g, so that 0 and -inf need no care. The sums are products of
a matrix of 0 and 1 with the gates: no value crosses from row to row by other means.

Legend: H query heads, G query heads a kv head, T tokens of a batch row, CHUNKS chunks of a batch
row, C tokens a chunk, W a block of key dims, K key dim, V value dim, BK, BD, BE tile sizes. A
*walk* is a run of M chunks one after the other, the work of one program of a sweep; N sequences.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_arithmetic import as_operand, split_decay
from transnormer.ops.linear_attention.triton_units import find_unit

# Arguments stand in lines as they belong together; one a line, they would be 400 lines.
# fmt: off


_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Decays below 2^-160 are 0 in float32, as is that of -inf; a larger number takes digits from sums.
_NOTHING: tl.constexpr = tl.constexpr(-160.0)


@triton.jit
def is_right(rows, level):
    """Whether rows lie in the right halves of the blocks of a level."""
    return ((rows >> level) & 1) == 1


@triton.jit
def within(rows, low, high):
    """[C, C]: the columns from low to high of each row; two comparisons an entry, no more."""
    return (rows[None, :] >= low[:, None]) & (rows[None, :] <= high[:, None])


@triton.jit
def decayed_by(rows, level):
    """[C, C]: whether at a level u of the row's token is decayed by the gate of the column's."""
    right, begin = is_right(rows, level), (rows >> level) << level
    end = rows | ((1 << level) - 1)
    return within(rows, tl.where(right, begin, rows + 1), tl.where(right, rows, end))


@triton.jit
def decaying(rows, level):
    """[C, C]: the transpose of decayed_by, whether the row's gate decays u of the column's token."""
    right, begin = is_right(rows, level), (rows >> level) << level
    end = rows | ((1 << level) - 1)
    return within(rows, tl.where(right, rows, begin), tl.where(right, end, rows - 1))


@triton.jit
def level_pairs(rows, level):
    """[C, C]: pairs of tokens in different halves of the same block of a level."""
    begin = ((rows >> level) ^ 1) << level
    return within(rows, begin, begin + (1 << level) - 1)


@triton.jit
def split_gates(gates, PARTS: tl.constexpr):
    """gates as a sum of one or two float16; products with 0 and 1 are exact.

    One part is enough beside products of bfloat16: 11 bits of an exponent, of which those of more
    than a few units belong to what has decayed away. Two have 22 bits, or are off by 3e-8.
    """
    high = gates.to(tl.float16)
    if PARTS == 1:
        return high, high
    return high, (gates - high.to(tl.float32)).to(tl.float16)


@triton.jit
def load_ones(ones, rows):
    """[C, C] ones, from memory: what is selected from them is laid out among the threads as they are.

    Of constants the compiler makes layouts that it writes to shared memory number by number.
    """
    return tl.load(ones + rows[:, None] * 0 + rows[None, :])


@triton.jit
def log2_sums(which, ones, high, low, PARTS: tl.constexpr):
    """Sums of the gates that ``which`` [C, C] selects for each row, [C, W]."""
    which = tl.where(which, ones, 0.0).to(tl.float16)
    sums = tl.dot(which, high)
    if PARTS == 2:
        sums = tl.dot(which, low, acc=sums)
    return sums


@triton.jit
def decays_of(which, ones, high, low, PARTS: tl.constexpr):
    """Decay by the gates that ``which`` [C, C] selects for each row, [C, W]."""
    return tl.exp2(log2_sums(which, ones, high, low, PARTS))


@triton.jit
def from_middle(rows, level, ones, high, low, PARTS: tl.constexpr):
    """[C, W]: gates summed up to a token, less those up to the middle of its block of 2^level."""
    middle = ((rows >> level) << level) | ((1 << level) >> 1)
    between = within(rows, tl.minimum(rows, middle) + 1, tl.maximum(rows, middle))
    sums = log2_sums(between, ones, high, low, PARTS)
    return tl.where((rows > middle)[:, None], sums, -sums)


@triton.jit
def halves_of(gates, rows, C: tl.constexpr):
    """Sums of gates [C, W] up to the middle of the chunk and behind it, [W] each."""
    first_half = (rows <= C // 2)[:, None]
    lead = tl.sum(tl.where(first_half, gates, 0.0), 0)
    return lead, tl.sum(tl.where(first_half, 0.0, gates), 0)


@triton.jit
def level_of_blocks(rows, ones, high, low, LEVELS: tl.constexpr, PARTS: tl.constexpr,
                    LIMIT: tl.constexpr):
    """The level of the largest blocks in which all is near the middle, LEVELS for the chunk."""
    base = 0
    for level in range(2, LEVELS, 2):
        middle = from_middle(rows, level, ones, high, low, PARTS)
        base = tl.where(tl.max(tl.max(tl.abs(middle), 1), 0) <= LIMIT, level, base)
    middle = from_middle(rows, LEVELS, ones, high, low, PARTS)
    return tl.where(tl.max(tl.max(tl.abs(middle), 1), 0) <= LIMIT, LEVELS, base)


@triton.jit
def block_scores(q_, k_, middle, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of pairs in one block, [C, C]; ``middle`` as from_middle gives it."""
    queries, q_factor = as_operand(q_.to(tl.float32) * tl.exp2(middle), DTYPE)
    keys, k_factor = as_operand(k_.to(tl.float32) * tl.exp2(-middle), DTYPE)
    return tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (q_factor * k_factor)


@triton.jit
def token_walk(start, length, step, REVERSE: tl.constexpr):
    """(first token in the order of the scan, its step to the next) of a run of tokens."""
    if REVERSE:
        return start + length - 1, -step
    return start, step


@triton.jit
def store_decays(first, total, log_total, at, gate, sum_, inside):
    """Decays of a chunk, see gates_kernel."""
    tl.store(first + at, tl.exp(gate), mask=inside)
    tl.store(total + at, tl.exp(sum_), mask=inside)
    tl.store(log_total + at, sum_, mask=inside)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H", "G"])
def gates_kernel(
    q, k, g, ones, scores, entering, leaving, first, total, log_total, halves, near, table, q_batch,
    q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head, T, CHUNKS, H, G,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    LIMIT: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Scores, decayed queries and keys and decays of one chunk and query head.

    scores [chunks, H, C, C], entering [chunks, H, C, K] and leaving [chunks, H / G, C, K] have
    their tokens in the order of the scan, 0 beyond the last one. first and total
    [chunks, H / G, K], float32, are the decays by the first token and by all of the chunk,
    log_total the sum of the latter's gates. halves [chunks, H / G, 2, K], float32,
    are the sums of the gates, times log2(e), up to the chunk's middle and behind it. near
    [chunks, H / G], int32, is 1 where no token decays further than by 2^-LIMIT from the middle; where
    it is 0 the scores mean nothing, and ``level_kernel`` makes them. ones has C of them, float16.
    """
    program = tl.program_id(0)
    head = program % H
    chunk = (program // H).to(tl.int64)
    sequence, row, start, length, _, _ = find_unit(chunk, table, T, C, CHUNKS, PACKED)
    if sequence < 0:
        return
    kv_head, kv_heads = (head // G).to(tl.int64), H // G
    owner = head % G == 0
    rows = tl.arange(0, C)
    q_at, q_step = token_walk(start, length, tl.cast(q_token, tl.int64), REVERSE)
    k_at, k_step = token_walk(start, length, tl.cast(k_token, tl.int64), REVERSE)
    g_at, g_step = token_walk(start, length, tl.cast(g_token, tl.int64), REVERSE)
    q += row * q_batch + q_at * q_token + head.to(tl.int64) * q_head + rows[:, None] * q_step
    k += row * k_batch + k_at * k_token + kv_head * k_head + rows[:, None] * k_step
    g += row * g_batch + g_at * g_token + kv_head * g_head
    entering += (chunk * H + head) * (C * K) + rows[:, None] * K
    leaving += (chunk * kv_heads + kv_head) * (C * K) + rows[:, None] * K
    index = chunk * kv_heads + kv_head
    inside = rows[:, None] < length
    later = rows[:, None] < rows[None, :]
    sums = tl.zeros([C, C], dtype=tl.float32)
    lowest = tl.zeros([BK], dtype=tl.float32)
    # The first token's gate stands apart.
    gated = (rows > 0) & (rows < length)
    for base in range(0, K, BK):
        dims = base + tl.arange(0, BK)
        within_key = dims[None, :] < K
        q_ = tl.load(q + dims[None, :], mask=inside & within_key, other=0.0).to(DTYPE)
        k_ = tl.load(k + dims[None, :], mask=inside & within_key, other=0.0).to(DTYPE)
        at = g + rows[:, None] * g_step + dims[None, :]
        raw = tl.load(at, mask=gated[:, None] & within_key, other=0.0).to(tl.float32)
        key_gates = tl.maximum(raw * _LOG2_E, _NOTHING)
        before = tl.cumsum(key_gates, 0)
        lead, trail = halves_of(key_gates, rows, C)
        lowest = tl.minimum(lowest, tl.minimum(lead, trail))
        if owner:
            here = (dims < K) & (length > 0)
            gate = tl.load(g + dims, mask=here, other=0.0).to(tl.float32)
            sum_ = gate + (lead + trail) * _LN_2
            store_decays(first, total, log_total, index * K + dims, gate, sum_, dims < K)
            tl.store(halves + index * (2 * K) + dims, lead, mask=dims < K)
            tl.store(halves + index * (2 * K) + K + dims, trail, mask=dims < K)
        prefix = tl.exp2(before)
        if PARTS == 1:
            suffix = tl.exp2((lead + trail)[None, :] - before)
        else:
            # The difference of two sums that may be far larger has too few digits.
            high, low = split_gates(key_gates, PARTS)
            suffix = decays_of(later, load_ones(ones, rows), high, low, PARTS)
        decayed = (q_.to(tl.float32) * prefix).to(entering.dtype.element_ty)
        tl.store(entering + dims[None, :], decayed, mask=within_key)
        if owner:
            decayed = (k_.to(tl.float32) * suffix).to(leaving.dtype.element_ty)
            tl.store(leaving + dims[None, :], decayed, mask=within_key)
        # Nothing overflows in scores that mean nothing.
        middle = tl.minimum(tl.maximum(before - lead[None, :], -LIMIT), LIMIT)
        sums += block_scores(q_, k_, middle, DTYPE, PRECISION)
    if owner:
        tl.store(near + index, (tl.min(lowest, 0) >= -LIMIT).to(tl.int32))
    sums = tl.where(later, 0.0, sums)
    at = scores + (chunk * H + head) * (C * C) + rows[:, None] * C + rows[None, :]
    tl.store(at, sums.to(scores.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "CHUNKS", "H", "G"])
def level_kernel(
    q, k, g, ones, scores, near, levels, table, q_batch, q_token, q_head, k_batch, k_token, k_head,
    g_batch, g_token, g_head, T, CHUNKS, H, G, K: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, LIMIT: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):
    """Scores of one chunk and query head whose gates are not near, as in gates_kernel.

    levels [chunks, H / G, key blocks], int32, gets the level of the blocks that are near.
    """
    BLOCKS: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0)
    head = program % H
    chunk = (program // H).to(tl.int64)
    sequence, row, start, length, _, _ = find_unit(chunk, table, T, C, CHUNKS, PACKED)
    if sequence < 0:
        return
    kv_head, kv_heads = (head // G).to(tl.int64), H // G
    index = chunk * kv_heads + kv_head
    if tl.load(near + index) != 0:
        return
    rows = tl.arange(0, C)
    q_at, q_step = token_walk(start, length, tl.cast(q_token, tl.int64), REVERSE)
    k_at, k_step = token_walk(start, length, tl.cast(k_token, tl.int64), REVERSE)
    g_at, g_step = token_walk(start, length, tl.cast(g_token, tl.int64), REVERSE)
    q += row * q_batch + q_at * q_token + head.to(tl.int64) * q_head + rows[:, None] * q_step
    k += row * k_batch + k_at * k_token + kv_head * k_head + rows[:, None] * k_step
    g += row * g_batch + g_at * g_token + kv_head * g_head + rows[:, None] * g_step
    inside = rows[:, None] < length
    ones = load_ones(ones, rows)
    sums = tl.zeros([C, C], dtype=tl.float32)
    for block in range(0, BLOCKS):
        dims = block * BK + tl.arange(0, BK)
        live = inside & (dims[None, :] < K)
        q_ = tl.load(q + dims[None, :], mask=live, other=0.0).to(DTYPE)
        k_ = tl.load(k + dims[None, :], mask=live, other=0.0).to(DTYPE)
        gates = tl.load(g + dims[None, :], mask=live & (rows > 0)[:, None], other=0.0)
        high, low = split_gates(tl.maximum(gates.to(tl.float32) * _LOG2_E, _NOTHING), PARTS)
        base = level_of_blocks(rows, ones, high, low, LEVELS, PARTS, LIMIT)
        if head % G == 0:
            tl.store(levels + index * BLOCKS + block, base)
        middle = from_middle(rows, base, ones, high, low, PARTS)
        new = block_scores(q_, k_, middle, DTYPE, PRECISION)
        for level in range(base, LEVELS):
            right = is_right(rows, level)[:, None]
            factor = decays_of(decayed_by(rows, level), ones, high, low, PARTS)
            u = (tl.where(right, q_, k_).to(tl.float32) * factor).to(DTYPE)
            products = tl.dot(u, tl.trans(u), input_precision=PRECISION)
            # What is no pair of this level or a lower one is one of a higher level.
            new = tl.where(((rows[:, None] ^ rows[None, :]) >> level) == 0, new, products)
        sums += new
    sums = tl.where(rows[:, None] < rows[None, :], 0.0, sums)
    at = scores + (chunk * H + head) * (C * C) + rows[:, None] * C + rows[None, :]
    tl.store(at, sums.to(scores.dtype.element_ty))


@triton.jit
def find_walk(walk, first_unit, N, CHUNKS, M, SEGMENTS, PACKED: tl.constexpr):
    """(first chunk, number of chunks) of a walk; packed, walks cross the bounds of sequences."""
    if PACKED:
        begin = walk.to(tl.int64) * M
        end = tl.load(first_unit + N)
    else:
        row = (walk // SEGMENTS).to(tl.int64)
        begin = row * CHUNKS + (walk % SEGMENTS).to(tl.int64) * M
        end = (row + 1) * CHUNKS
    return begin, tl.maximum(tl.minimum(end - begin, M), 0)


@triton.jit
def load_vector(pointer, index, dims, K: tl.constexpr):
    """Decays of a chunk, a number for each of dims."""
    return tl.load(pointer + index * K + dims, mask=dims < K, other=0.0)


@triton.jit
def decayed_state(
    state, total, log_total, index, dims, AXIS: tl.constexpr, K: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The state after a chunk's decay; dims run along ``AXIS``. EXACT as in triton_constant."""
    if EXACT:
        kept, rest = split_decay(load_vector(log_total, index, dims, K))
        kept, rest = tl.expand_dims(kept, 1 - AXIS), tl.expand_dims(rest, 1 - AXIS)
        return state * kept + state * rest
    return state * tl.expand_dims(load_vector(total, index, dims, K), 1 - AXIS)


@triton.jit
def state_tile(dims, values, K: tl.constexpr, V: tl.constexpr):
    """(offsets, mask) of a tile [values, dims] of a state [K, V]."""
    return (
        dims[None, :] * V + values[:, None],
        (dims[None, :] < K) & (values[:, None] < V),
    )


@triton.jit(do_not_specialize=["T", "CHUNKS", "M", "SEGMENTS", "N", "H", "G"])
def sweep_kernel(
    entering, leaving, scores, v, firsts, totals, log_totals, initial, entry, o, final, table,
    first_unit,
    v_batch, v_token, v_head, T, CHUNKS, M, SEGMENTS, N, H, G, scale, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    INITIAL: tl.constexpr, CARRIED: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):
    """Outputs of one walk, query head and slice of values, and the final states it reaches.

    ``entry`` [walks, H / G, K, V] is what enters walks, where CARRIED; a sequence that begins in a
    walk starts from ``initial`` [sequences, H / G, K, V], or 0. S is held as [value, key]: the
    products with it then take it from registers.
    """
    SLICES: tl.constexpr = (V + BE - 1) // BE
    program = tl.program_id(0)
    head = (program // SLICES) % H
    walk = program // (SLICES * H)
    kv_head, kv_heads = (head // G).to(tl.int64), H // G
    rows, dims = tl.arange(0, C), tl.arange(0, BD)
    values = (program % SLICES) * BE + tl.arange(0, BE)
    offsets, inside = state_tile(dims, values, K, V)
    begin, count = find_walk(walk, first_unit, N, CHUNKS, M, SEGMENTS, PACKED)
    state = tl.zeros([BE, BD], dtype=tl.float32)
    if CARRIED:
        index = walk.to(tl.int64) * kv_heads + kv_head
        state = tl.load(entry + index * (K * V) + offsets, mask=inside, other=0.0)
    elif INITIAL and not PACKED:
        index = (walk // SEGMENTS).to(tl.int64) * kv_heads + kv_head
        state = tl.load(initial + index * (K * V) + offsets, mask=inside, other=0.0)
    v_head_at = v + kv_head * v_head
    o_token = tl.cast(H, tl.int64) * V
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = begin + i
        if REVERSE:
            chunk = begin + count - 1 - i
        sequence, row, start, length, first, last = find_unit(chunk, table, T, C, CHUNKS, PACKED)
        starts, ends = first, last
        if REVERSE:
            starts, ends = last, first
        if PACKED and starts:
            state = tl.zeros([BE, BD], dtype=tl.float32)
            if INITIAL:
                index = sequence * kv_heads + kv_head
                state = tl.load(initial + index * (K * V) + offsets, mask=inside, other=0.0)
        at, step = token_walk(start, length, tl.cast(v_token, tl.int64), REVERSE)
        v_at = v_head_at + row * v_batch + at * v_token
        live = (rows[None, :] < length) & (values[:, None] < V)
        v_ = tl.load(v_at + values[:, None] + rows[None, :] * step, mask=live, other=0.0).to(DTYPE)
        query, key = (chunk * H + head) * C, (chunk * kv_heads + kv_head) * C
        tokens = rows[:, None] * K + dims[None, :]
        if K == BD:
            q_ = tl.load(entering + query * K + tokens).to(DTYPE)
            k_ = tl.load(leaving + key * K + tokens).to(DTYPE)
        else:
            q_ = tl.load(entering + query * K + tokens, mask=dims[None, :] < K, other=0.0).to(DTYPE)
            k_ = tl.load(leaving + key * K + tokens, mask=dims[None, :] < K, other=0.0).to(DTYPE)
        # Transposed by their addresses: [key position, query position].
        p_ = tl.load(scores + query * C + rows[:, None] + rows[None, :] * C)
        index = chunk * kv_heads + kv_head
        decay = load_vector(firsts, index, dims, K)
        state_, factor = as_operand(state * decay[None, :], DTYPE)
        out = tl.dot(state_, tl.trans(q_), input_precision=PRECISION) * factor
        p_, factor = as_operand(p_, DTYPE)
        if DTYPE == tl.float16:
            out += tl.dot(v_, p_, input_precision=PRECISION) * factor
        else:
            out = tl.dot(v_, p_, acc=out, input_precision=PRECISION)
        state = decayed_state(state, totals, log_totals, index, dims, 1, K, EXACT)
        state = tl.dot(v_, k_, acc=state, input_precision=PRECISION)
        at, step = token_walk(start, length, o_token, REVERSE)
        o_at = o + (row * T + at) * o_token + head * V
        out = (out * scale).to(o.dtype.element_ty)
        tl.store(o_at + values[:, None] + rows[None, :] * step, out, mask=live)
        if head % G == 0 and ends:
            index = sequence * kv_heads + kv_head
            tl.store(final + index * (K * V) + offsets, state, mask=inside)


@triton.jit(do_not_specialize=["T", "CHUNKS", "M", "SEGMENTS", "N", "H", "G"])
def states_kernel(
    a, b, firsts, totals, log_totals, initial, entry, states, final, decays, table, first_unit, b_batch,
    b_token, b_head, T, CHUNKS, M, SEGMENTS, N, H, G, scale, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, ENDS: tl.constexpr,
    FINAL: tl.constexpr, GRADIENT: tl.constexpr, INITIAL: tl.constexpr, CARRIED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):
    """A state before each chunk of a walk, of some dims and values of one head.

    Of the forward pass: S = exp(total) S + a^T b with a the decayed keys and b the values. GRADIENT:
    against the order of the scan, R = exp(total) R + exp(first) scale a^T b with a the decayed
    queries and b the gradient of the outputs, R being the gradient of the state that leaves a chunk;
    a, b and R then have H query heads, G of them a gate. ``states`` [chunks, H, K, V]; final
    [sequences, H, K, V] gets the state after a sequence where FINAL. ENDS: only the walks' ends are
    written, states [walks, H, K, V] and the logs of what decays what entered, decays [walks, H, K].
    """
    SLICES: tl.constexpr = (V + BE - 1) // BE
    PIECES: tl.constexpr = (K + BD - 1) // BD
    AGAINST: tl.constexpr = REVERSE != GRADIENT
    program = tl.program_id(0)
    head = (program // (SLICES * PIECES)) % H
    walk = program // (SLICES * PIECES * H)
    query_head, gate, gates = head.to(tl.int64), (head // G).to(tl.int64), H // G
    # The last walk's end is nobody's entry.
    if ENDS:
        done = walk % SEGMENTS == 0 if AGAINST else walk % SEGMENTS == SEGMENTS - 1
        if done:
            return
    rows = tl.arange(0, C)
    dims = (program // SLICES % PIECES) * BD + tl.arange(0, BD)
    values = (program % SLICES) * BE + tl.arange(0, BE)
    offsets = dims[:, None] * V + values[None, :]
    inside = (dims[:, None] < K) & (values[None, :] < V)
    begin, count = find_walk(walk, first_unit, N, CHUNKS, M, SEGMENTS, PACKED)
    state = tl.zeros([BD, BE], dtype=tl.float32)
    decayed = tl.zeros([BD], dtype=tl.float32)
    owner = head % G == 0
    if CARRIED:
        index = walk.to(tl.int64) * H + head
        state = tl.load(entry + index * (K * V) + offsets, mask=inside, other=0.0)
    elif INITIAL and not PACKED and not ENDS:
        index = (walk // SEGMENTS).to(tl.int64) * gates + gate
        state = tl.load(initial + index * (K * V) + offsets, mask=inside & owner, other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = begin + i
        if AGAINST:
            chunk = begin + count - 1 - i
        sequence, row, start, length, first, last = find_unit(chunk, table, T, C, CHUNKS, PACKED)
        starts, ends = first, last
        if AGAINST:
            starts, ends = last, first
        if PACKED and starts:
            state = tl.zeros([BD, BE], dtype=tl.float32)
            if INITIAL:
                at = initial + (sequence * gates + gate) * (K * V) + offsets
                state = tl.load(at, mask=inside & owner, other=0.0)
            # What entered the walk does not reach beyond a sequence.
            decayed = tl.full([BD], float("-inf"), dtype=tl.float32)
        index = chunk * H + head
        if not ENDS:
            at = states + index * (K * V) + offsets
            tl.store(at, state.to(states.dtype.element_ty), mask=inside)
        # Transposed by its addresses.
        a_at = a + index * (C * K) + dims[:, None] + rows[None, :] * K
        a_ = tl.load(a_at, mask=dims[:, None] < K, other=0.0).to(DTYPE)
        at, step = token_walk(start, length, tl.cast(b_token, tl.int64), REVERSE)
        b_at = b + row * b_batch + at * b_token + query_head * b_head + rows[:, None] * step
        live = (rows[:, None] < length) & (values[None, :] < V)
        b_ = tl.load(b_at + values[None, :], mask=live, other=0.0).to(DTYPE)
        index = chunk * gates + gate
        state = decayed_state(state, totals, log_totals, index, dims, 0, K, EXACT)
        if GRADIENT:
            decay = load_vector(firsts, index, dims, K) * scale
            state += tl.dot(a_, b_, input_precision=PRECISION) * decay[:, None]
        else:
            state = tl.dot(a_, b_, acc=state, input_precision=PRECISION)
        if ENDS:
            decayed += load_vector(log_totals, index, dims, K)
        if FINAL and ends:
            reached = final + (sequence * H + head) * (K * V) + offsets
            tl.store(reached, state, mask=inside)
    if ENDS:
        index = walk.to(tl.int64) * H + head
        tl.store(states + index * (K * V) + offsets, state, mask=inside)
        tl.store(decays + index * K + dims, decayed, mask=(dims < K) & (program % SLICES == 0))


@triton.jit(do_not_specialize=["SEGMENTS", "H", "G"])
def carry_walks_kernel(
    ends, decays, initial, entry, SEGMENTS, H, G, K: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, INITIAL: tl.constexpr, AGAINST: tl.constexpr,
):
    """From the ends of walks to the states that enter them, [rows * SEGMENTS, H, K, V] all.

    A program has BLOCK entries of one row's and head's states. ``initial`` [rows, H / G, K, V]
    enters at the first head of each group.
    """
    BLOCKS: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    entries = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < K * V
    head = (program // BLOCKS) % H
    row = (program // (BLOCKS * H)).to(tl.int64)
    carry = tl.zeros([BLOCK], dtype=tl.float32)
    if INITIAL:
        index = row * (H // G) + head // G
        owner = inside & (head % G == 0)
        carry = tl.load(initial + index * (K * V) + entries, mask=owner, other=0.0)
    for i in range(0, SEGMENTS):
        j = i
        if AGAINST:
            j = SEGMENTS - 1 - i
        index = (row * SEGMENTS + j) * H + head
        tl.store(entry + index * (K * V) + entries, carry, mask=inside)
        # The last one's end was not written.
        live = inside & (i < SEGMENTS - 1)
        new = tl.load(ends + index * (K * V) + entries, mask=live, other=0.0)
        kept, rest = split_decay(tl.load(decays + index * K + entries // V, mask=live, other=0.0))
        carry = carry * kept + carry * rest + new
