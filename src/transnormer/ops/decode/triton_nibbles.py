"""A row times a matrix of 4-bit integers, with the norm, the gate, the sum or the product beside it.

    W_nk = (q_nk - 8) scale_ng + zero_ng,  q_nk from 0 to 15, g the group of column k

For ``triton_projection.project``: what is read is 4 bits a weight and 32 a group.
Eight integers share a word. Masked where they lie, the bits of one are a float32 as they are: the
bits below 2^24 of a float32 are a number of steps of 2^-149. The power of two that this leaves is
in the row's entry that it is multiplied with, so a weight costs a mask and a multiply-add, exactly.
Sums are float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.decode.triton_launch import (
    activated,
    finish_row,
    let_next_begin,
    wait_for_inputs,
)

_LEAST_GROUP = 32
# Arguments stand in lines as they belong together.
# fmt: off


@triton.jit
def entry_of(words, i: tl.constexpr):
    """Entry i of each word, times 2^(its place - 149)."""
    PLACE: tl.constexpr = 4 * i if i < 6 else 4 * i - 8
    moved = words if i < 6 else words >> 8
    return (moved & (15 << PLACE)).to(tl.float32, bitcast=True)


@triton.jit
def load_words(w, at, rows, groups, N: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """Words of some rows and groups, 0 outside."""
    if EVEN:
        return tl.load(w + at)
    return tl.load(w + at, mask=(groups < GROUPS)[:, None, None] & (rows < N)[None, :, None], other=0)


@triton.jit
def load_pairs(pairs, rows, groups, N: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """Scale and zero of some rows and groups, one bfloat16 each."""
    at = pairs + rows[None, :].to(tl.int64) * GROUPS + groups[:, None]
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(groups < GROUPS)[:, None] & (rows < N)[None, :], other=0)


@triton.jit
def weighed(sums, pairs, total):
    """scale (2^85 sums - 8 total) + zero total, [groups, rows, words], by the groups' pairs."""
    scale = (pairs << 16).to(tl.float32, bitcast=True)
    zero = (pairs & -65536).to(tl.float32, bitcast=True)
    zero -= 8.0 * scale
    scale *= 2.0 ** 85
    return sums * scale[:, :, None] + total[:, None, :] * zero[:, :, None]


@triton.jit
def nibbles_kernel(
    x, gate, w, w2, pairs, pairs2, residual, y, eps,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr, DOUBLE: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD: tl.constexpr, OVERLAP: tl.constexpr,
):
    """BLOCK_N entries of y, BLOCK_G groups of weights a turn; DOUBLE has a second matrix."""
    WORDS: tl.constexpr = GROUP // 8
    GROUPS: tl.constexpr = K // GROUP
    EVEN: tl.constexpr = (N % BLOCK_N == 0) and (GROUPS % BLOCK_G == 0)
    LAST: tl.constexpr = (GROUPS - 1) // BLOCK_G * BLOCK_G
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups, word = tl.arange(0, BLOCK_G), tl.arange(0, WORDS)
    # Groups first: lanes are handed out to them before rows, so that a thread's entries of x serve
    # all of its rows.
    at = rows[None, :, None].to(tl.int64) * (K // 8)
    at += groups[:, None, None] * WORDS + word[None, None, :]
    let_next_begin(OVERLAP)
    first = load_words(w, at, rows, groups, N, GROUPS, EVEN)
    pair = load_pairs(pairs, rows, groups, N, GROUPS, EVEN)
    second, pair2 = first, pair
    if DOUBLE:
        second = load_words(w2, at, rows, groups, N, GROUPS, EVEN)
        pair2 = load_pairs(pairs2, rows, groups, N, GROUPS, EVEN)
    sums = tl.zeros([BLOCK_G, BLOCK_N, WORDS], tl.float32)
    sums2 = tl.zeros([BLOCK_G, BLOCK_N, WORDS] if DOUBLE else [1, 1, 1], tl.float32)
    squares = tl.zeros([BLOCK_G, WORDS], tl.float32)
    wait_for_inputs(OVERLAP)
    for g in tl.range(0, GROUPS, BLOCK_G):
        now, now2, weight, weight2 = first, second, pair, pair2
        if GROUPS > BLOCK_G:
            # The tile of the next turn; beyond the last one it reads the last again.
            ahead = tl.minimum(g + BLOCK_G, LAST)
            first = load_words(w, at + ahead * WORDS, rows, ahead + groups, N, GROUPS, EVEN)
            pair = load_pairs(pairs, rows, ahead + groups, N, GROUPS, EVEN)
            if DOUBLE:
                second = load_words(w2, at + ahead * WORDS, rows, ahead + groups, N, GROUPS, EVEN)
                pair2 = load_pairs(pairs2, rows, ahead + groups, N, GROUPS, EVEN)
        part = tl.zeros([BLOCK_G, BLOCK_N, WORDS], tl.float32)
        part2 = tl.zeros([BLOCK_G, BLOCK_N, WORDS] if DOUBLE else [1, 1, 1], tl.float32)
        total = tl.zeros([BLOCK_G, WORDS], tl.float32)
        for i in tl.static_range(8):
            column = (g + groups)[:, None] * GROUP + i * WORDS + word[None, :]
            inside = ((g + groups) < GROUPS)[:, None]
            a = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                squares += a * a
            if GATED:
                u = tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
                a *= activated(u, GATE_ACTIVATION).to(gate.dtype.element_ty).to(tl.float32)
            total += a
            # Up to 2^64: what is normed only afterwards grows with the context. Inputs up to 2^64,
            # beyond which their squares overflow too, and down to 2^-41 keep all their bits.
            a *= 2.0 ** (64 - (4 * i if i < 6 else 4 * i - 8))
            part += entry_of(now, i) * a[:, None, :]
            if DOUBLE:
                part2 += entry_of(now2, i) * a[:, None, :]
        sums += weighed(part, weight, total)
        if DOUBLE:
            sums2 += weighed(part2, weight2, total)
    out = tl.sum(tl.sum(sums, 2), 0)
    up = tl.sum(tl.sum(sums2, 2), 0)
    square = tl.sum(tl.sum(squares, 1), 0)
    finish_row(out, up, square, rows, residual, y, eps, N, K, NORM, DOUBLE, ACTIVATION, ADD)


class Nibbles(NamedTuple):
    """A weight [N, K] of 4-bit integers.

    Attributes:
        words: int32 [N, K / 8]: of a group of G columns word j has the columns j, j + G / 8, ...
        pairs: int32 [N, K / G], two bfloat16 each: the scale in the lower half, the zero above it.
        group: G, a power of two.
    """

    words: Tensor
    pairs: Tensor
    group: int


def pack(ints: Tensor, scales: Tensor, zeros: Tensor) -> Nibbles | None:
    """Integers from 0 to 15, [N, K], and bfloat16 scales and zeros [N, K / G] as kernels read them.

    Returns:
        The weight (ints - 8) x scales + zeros; None for groups that are no power of two of at least
        32, or scales of another dtype.
    """
    (outputs, inputs), groups = ints.shape, scales.shape[1]
    group = inputs // groups
    if group < _LEAST_GROUP or group & (group - 1) or group * groups != inputs:
        return None
    if scales.dtype != torch.bfloat16 or zeros.dtype != torch.bfloat16:
        return None
    parts = ints.view(outputs, groups, 8, group // 8).to(torch.int32)
    words = parts.new_zeros(outputs, groups, group // 8)
    for i in range(8):
        words |= parts[:, :, i] << 4 * i
    low, high = (x.contiguous().view(torch.int16).to(torch.int32) for x in (scales, zeros))
    return Nibbles(words.flatten(1), (low & 0xFFFF) | high << 16, group)
