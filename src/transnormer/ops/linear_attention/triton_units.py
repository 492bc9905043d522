"""Which tokens a program works on: sequences cut into segments, packed or one a batch row.

A unit is one segment of one sequence. The number of units follows from shapes alone, so that no
launch waits for the device: with packed sequences, whose bounds lie on the device, it is an upper
bound, and a kernel writes the table of units, in which those beyond the last have sequence -1.

Legend: T tokens of a row, L tokens a segment, N sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transnormer.ops.linear_attention.triton_runtime import launch

_BLOCK = 1024


@triton.jit
def load_bounds(cu_seqlens, n, T, live):
    """Start and stop of sequences n, made to lie within the row whatever the bounds are."""
    start = tl.load(cu_seqlens + n, mask=live, other=0).to(tl.int64)
    stop = tl.load(cu_seqlens + n + 1, mask=live, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), T)
    return start, tl.minimum(tl.maximum(stop, start), T)


@triton.jit(do_not_specialize=["N", "T", "L", "bound"])
def unit_table_kernel(cu_seqlens, table, first_unit, N, T, L, bound, BLOCK: tl.constexpr):
    """Program n writes sequence n's units: (sequence, start, length, is last) int64 each.

    An empty sequence has one unit of length 0, which passes its state on. Program N fills the rest
    up to ``bound`` with sequence -1. first_unit [N + 1] gets the number of the units before each
    sequence, and of all. Bounds that are no bounds, which nobody can see without waiting for the
    device, give wrong results but touch nothing outside of the tensors.
    """
    n = tl.program_id(0)
    before = tl.zeros([BLOCK], dtype=tl.int64)
    for base in range(0, n, BLOCK):
        i = base + tl.arange(0, BLOCK)
        live = i < n
        start, stop = load_bounds(cu_seqlens, i, T, live)
        before += tl.where(live, tl.maximum((stop - start + L - 1) // L, 1), 0)
    first = tl.minimum(tl.sum(before, 0), bound)
    tl.store(first_unit + n, first)
    fields = tl.arange(0, 4)
    if n < N:
        start, stop = load_bounds(cu_seqlens, n, T, n < N)
        length = stop - start
        count = tl.maximum((length + L - 1) // L, 1)
        for j in range(0, tl.minimum(count, bound - first)):
            here = start + j * L
            size = tl.minimum(length - j * L, L)
            last = (j == count - 1).to(tl.int64)
            row = tl.where(fields == 0, n, here)
            row = tl.where(fields == 2, size, row)
            tl.store(table + (first + j) * 4 + fields, tl.where(fields == 3, last, row))
    else:
        for j in range(first, bound):
            tl.store(table + j * 4 + fields, tl.full([4], -1, dtype=tl.int64))


@triton.jit
def find_unit(unit, table, T, L, SEGMENTS, PACKED: tl.constexpr):
    """(sequence, batch row, start, length, is first, is last) of a unit; sequence -1 has no work.

    Positions are int64: tensors may hold more than 2^31 elements.
    """
    if PACKED:
        sequence = tl.load(table + unit * 4)
        start = tl.load(table + unit * 4 + 1)
        length = tl.load(table + unit * 4 + 2)
        last = tl.load(table + unit * 4 + 3) != 0
        before = tl.load(table + tl.maximum(unit - 1, 0) * 4)
        first = (unit == 0) | (before != sequence)
        row = sequence * 0
    else:
        sequence = (unit // SEGMENTS).to(tl.int64)
        segment = unit % SEGMENTS
        start = segment.to(tl.int64) * L
        length = tl.maximum(tl.minimum(T - start, L), 0)
        first = segment == 0
        last = segment == SEGMENTS - 1
        row = sequence
    return sequence, row, start, length, first, last


def unit_table(cu_seqlens: Tensor, seq: int, length: int) -> tuple[Tensor, Tensor]:
    """The table of units of at most ``length`` tokens, int64 [units, 4], and first_unit [N + 1].

    units = N + seq // length, the most that N sequences of seq tokens together can have.
    """
    sequences = cu_seqlens.shape[0] - 1
    units = sequences + seq // length
    table = torch.empty(units, 4, dtype=torch.int64, device=cu_seqlens.device)
    first_unit = table.new_empty(sequences + 1)
    launch(
        unit_table_kernel, sequences + 1, cu_seqlens, table, first_unit, sequences, seq, length,
        units, BLOCK=_BLOCK,
    )  # fmt: skip
    return table, first_unit
