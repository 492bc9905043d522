"""Linear attention with gates as torch ops whose kernels are Triton's, and how calls are cut.

A call is cut into chunks, each the work of a program of its own, and the chunks into walks, along
which a state passes. The backward op computes everything again from the inputs: what the forward
pass makes of the chunks is larger than they are.

``attention_ops`` has the ops' contract for torch, ``triton_gated_launch`` what they run; this file
needs no Triton.
"""

from typing import NamedTuple

from torch import Tensor

from transnormer.ops.linear_attention import launch_config
from transnormer.ops.linear_attention.attention_ops import define_attention
from transnormer.ops.linear_attention.constant_decay import gpu_of


class Chunks(NamedTuple):
    """How the tokens of a call are cut into chunks of at most ``length`` tokens."""

    length: int
    row: int  # chunks of a batch row; an upper bound where sequences are packed
    count: int  # of all rows


class Walks(NamedTuple):
    """How chunks are cut into runs of at most ``length``, one program's work in a sweep."""

    length: int
    segments: int  # walks of a batch row
    count: int  # of all rows


def chunks_of(k: Tensor, length: int, cu_seqlens: Tensor | None) -> Chunks:
    """The cut of a call; shapes alone decide, so that nothing waits for the device."""
    batch, seq = k.shape[:2]
    if cu_seqlens is not None:
        # Each sequence ends with at most one short chunk.
        count = cu_seqlens.shape[0] - 1 + seq // length
        return Chunks(length, count, count)
    row = -(-seq // length)
    return Chunks(length, row, batch * row)


def walks_of(k: Tensor, chunks: Chunks, programs: int) -> Walks:
    """Walks of a sweep that has so many programs for each batch row."""
    batch, seq = k.shape[:2]
    segments = launch_config.segments_of(batch * programs, seq, gpu_of(k.device))
    return Walks(-(-chunks.row // segments), segments, batch * segments)


gated_decay_attention = define_attention("gated_decay_attention", "triton_gated_launch")
