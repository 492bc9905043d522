"""How scans over channels are cut into programs: from shapes alone, nothing waits for the device."""

from typing import NamedTuple

from torch import Tensor

from transnormer.ops.linear_attention.launch_config import block_of

# Programs that an H100's 132 multiprocessors get of long inputs: 16 each hide one another's waits.
_PROGRAMS = 2112
# Tokens a unit; shorter ones would make the scan over units as long as one over tokens.
_LEAST, _MOST = 16, 4096


class Units(NamedTuple):
    """Segments of sequences, and blocks of channels; a program has one of each."""

    length: int  # tokens of a unit, at most
    segments: int  # units of a batch row; 0 where sequences are packed
    count: int  # of all rows; an upper bound where sequences are packed
    sequences: int
    width: int  # channels of a block
    blocks: int
    warps: int
    whole: bool  # every sequence is one unit


def units_of(batch: int, seq: int, channels: int, cu_seqlens: Tensor | None) -> Units:
    """The cut of a scan over [batch, seq, channels]."""
    width = min(block_of(channels, 32), 256)
    blocks, warps = -(-channels // width), max(width // 128, 1)
    length = _LEAST
    while length < _MOST and batch * seq * blocks > length * _PROGRAMS:
        length *= 2
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        # Lengths of sequences are not known here: a row of one unit's length has no longer one.
        count = sequences + seq // length
        return Units(length, 0, count, sequences, width, blocks, warps, seq <= length)
    segments = max(-(-seq // length), 1)
    count = batch * segments
    return Units(length, segments, count, batch, width, blocks, warps, segments == 1)
