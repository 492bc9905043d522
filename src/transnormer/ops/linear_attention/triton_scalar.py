"""Scalar gates, one a token and head, in the sweeps of ``triton_constant``.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T;    o_t = scale * q_t S_t        (g_t = log_decay <= 0)

The sweep is that of constant decay with the vectors and the mask made anew for each chunk. With
c_i the sum of the chunk's gates up to token i, its own included, and n its last token, all in the
order of the scan:

    O = [(Q K^T) * exp(c_i - c_j)] V + exp(c_i) * Q S      (pairs i >= j)
    S = exp(c_n) S + sum over j of exp(c_n - c_j) k_j v_j^T

The sweeps against the order of the scan, for dK and dV, have exp(c_n - c_i) where these have
exp(c_i) and the other way round, and exp(c_j - c_i) in the mask. Chunks begin at the same tokens
in all sweeps, so that what walks from the last token meets the short chunk of a unit first.

Differences of sums are exact: ``gate_sums_kernel`` counts gates, as powers of two, in steps of
2^-10, and what is left of each apart. A sum of counts is a whole number below 2^24, which a float32
holds; sums of what is left are below 2^-4 and as exact as the gates are. Gates below -160 count as
-160: 2^-160 is 0 in float32, as is the decay of -inf. For products of bfloat16 the two are added,
since 2^-11 is the most that a sum is then off, and only behind a decay to nothing.

Source: Yang et al. 2024, arXiv:2312.06635, section 4 (chunks); Dao and Gu 2024, arXiv:2405.21060
(scalar gates). Legend as in ``triton_constant``; PARTS numbers hold a sum.
"""

import triton
import triton.language as tl

from transnormer.ops.linear_attention.triton_arithmetic import as_operand, product
from transnormer.ops.linear_attention.triton_units import find_unit

# Arguments stand in lines as they belong together.
# fmt: off

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
_NOTHING: tl.constexpr = tl.constexpr(-160.0)
_STEPS: tl.constexpr = tl.constexpr(1024.0)


@triton.jit(do_not_specialize=["T", "L", "SEGMENTS", "H", "CHUNKS"])
def gate_sums_kernel(
    g, sums, table, g_batch, g_token, g_head, T, L, SEGMENTS, H, CHUNKS, C: tl.constexpr,
    BH: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):
    """Sums of the gates of one chunk of a unit from its first token on, for BH heads.

    sums [batch, H, T, PARTS] float32: powers of two, a multiple of 2^-10 and the rest. A unit has
    at most CHUNKS chunks. REVERSE: from the chunk's last token on.
    """
    BLOCKS = (H + BH - 1) // BH
    program = tl.program_id(0)
    heads = (program % BLOCKS) * BH + tl.arange(0, BH)
    begin = (program // BLOCKS % CHUNKS) * C
    unit = program // (BLOCKS * CHUNKS)
    sequence, row, start, length, _, _ = find_unit(unit, table, T, L, SEGMENTS, PACKED)
    size = tl.minimum(length - begin, C)
    if (sequence < 0) | (size <= 0):
        return
    rows = tl.arange(0, C)
    inside = (rows[:, None] < size) & (heads[None, :] < H)
    tokens = start + begin + rows
    if REVERSE:
        tokens = start + begin + size - 1 - rows
    tokens, heads = tokens[:, None], heads[None, :].to(tl.int64)
    at = g + row * g_batch + tokens * g_token + heads * g_head
    gates = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gates = tl.maximum(gates * _LOG2_E, _NOTHING)
    high = (gates * _STEPS).to(tl.int32).to(tl.float32) * (1.0 / _STEPS)
    low = tl.cumsum(gates - high, 0)
    high = tl.cumsum(high, 0)
    at = sums + ((row * H + heads) * T + tokens) * PARTS
    if PARTS == 1:
        tl.store(at, high + low, mask=inside)
    else:
        tl.store(at, high, mask=inside)
        tl.store(at + 1, low, mask=inside)


@triton.jit
def load_sums(at, inside, TAIL: tl.constexpr, PARTS: tl.constexpr):
    """(multiple of 2^-10, rest) of sums of gates; 0 beyond the tokens."""
    if TAIL:
        high = tl.load(at, mask=inside, other=0.0)
        low = 0.0
        if PARTS == 2:
            low = tl.load(at + 1, mask=inside, other=0.0)
    else:
        high = tl.load(at)
        low = 0.0
        if PARTS == 2:
            low = tl.load(at + 1)
    return high, low


@triton.jit
def end_factors(
    sums, rows, left, STEP: tl.constexpr, AGAINST: tl.constexpr, PARTS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Decay from a chunk's start to each of its tokens, from these to its end, [C], and of all.

    The last as a power of two. AGAINST the order of the scan, start and end change places in the
    first two. sums points at the first token of the walk, whose steps are STEP, 1 or -1.
    """
    last = 0 if AGAINST else (left - 1) * STEP
    high_total, low_total = load_sums(sums + last * PARTS, True, False, PARTS)
    high, low = load_sums(sums + rows * (STEP * PARTS), rows < left, TAIL, PARTS)
    reached, ahead = tl.exp2(high + low), tl.exp2((high_total - high) + (low_total - low))
    if AGAINST:
        reached, ahead = ahead, reached
    return reached, ahead, high_total + low_total


@triton.jit
def pair_factors(
    sums, rows, left, STEP: tl.constexpr, AGAINST: tl.constexpr, PARTS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Decay between each two tokens, [key position, query position], 0 for later keys."""
    at = sums + rows * (STEP * PARTS)
    high_key, low_key = load_sums(at[:, None], rows[:, None] < left, TAIL, PARTS)
    high_query, low_query = load_sums(at[None, :], rows[None, :] < left, TAIL, PARTS)
    if AGAINST:
        exponent = (high_key - high_query) + (low_key - low_query)
    else:
        exponent = (high_query - high_key) + (low_query - low_key)
    if TAIL:
        # Beyond the tokens the sums are 0, and may be above those before.
        exponent = tl.minimum(exponent, 0.0)
    return tl.exp2(tl.where(rows[None, :] >= rows[:, None], exponent, float("-inf")))


@triton.jit
def query_shares(out, q, rows, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """What pairs of a chunk's queries and earlier keys add to the gradients of its gates, [BE, C].

    All shares are those of a slice BE of the key dims in the sweep for dQ, to be summed over their
    first dim. ``out`` [BE, C] are the gradients of the queries that come from the state, q is a
    tile. The gate of t is part of the pairs of all queries from t on.
    """
    until = tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0).to(DTYPE)
    return product(out * q.to(tl.float32), until, DTYPE, PRECISION)


@triton.jit
def key_shares(v, k, r, state, weight, decay, left, rows, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """The same of pairs of a chunk's keys and later queries, and of pairs that span it, [BE, C].

    v [C, BD] and k [BE, C] are tiles, r [BE, BD] is the gradient of the state that leaves, weight
    [C] and decay are those of keys and of the state up to there. The gate of t is part of the pairs
    of all keys before t, and of those of any earlier with any later token.
    """
    spans = tl.sum(r.to(tl.float32) * state, 1) * decay
    r_, factor = as_operand(r.to(tl.float32), DTYPE)
    keys = tl.dot(r_, tl.trans(v), input_precision=PRECISION) * k.to(tl.float32)
    # No gate of the chunk is after its last token, whose share may be the largest by far.
    weight = tl.where(rows < left - 1, weight * factor, 0.0)
    after = tl.where(rows[:, None] < rows[None, :], 1.0, 0.0).to(DTYPE)
    return product(keys * weight[None, :], after, DTYPE, PRECISION) + spans[:, None]


@triton.jit
def pair_shares(p, q, k, rows, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """The same of pairs within the chunk, [C, C]; p [C, C] are their scores dO V^T, as in ``chunk``.

    The gate of t is part of the pairs of a query at t or later and a key before t.
    """
    here = rows[:, None] >= rows[None, :]
    until = tl.where(here, 1.0, 0.0).to(DTYPE)
    pairs = tl.dot(tl.trans(k), q, input_precision=PRECISION) * p
    # The diagonal takes no part, and would be what a float16 is scaled by.
    sums = product(tl.where(here, 0.0, pairs), until, DTYPE, PRECISION)
    return tl.where(here, 0.0, sums)
