"""How the tokens of a call map to chunks and to segments of chunks.

A segment is what is processed at once: so many chunks that its temporaries stay in the cache, and
so few that no tensor of the size of all chunk states exists.

Legend: B batch, H kv heads, G query heads a kv head, T seq, X rows (B * H, packed: H), N chunks of
a segment, C tokens a chunk, K key dim, V value dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype

# Measured on CPUs: 32 and 128 are slower, with constant and with gated decay.
_MAX_CHUNK = 64
# Of packed sequences: below this the loop over chunks costs more than the padding.
_MIN_CHUNK = 16
# Elements of one [X, N, C, dim] temporary: 1 MiB in float32, so that a few of them fit the cache.
_SEGMENT_ELEMENTS = 1 << 18


class Chunk(NamedTuple):
    sequence: int  # row of the state that it belongs to; 0 where sequences lie along the batch
    start: int
    length: int
    first: bool
    last: bool


class Segment(NamedTuple):
    chunks: list[Chunk]
    start: int
    stop: int


def chunks_per_segment(rows: int, groups: int, key_dim: int, value_dim: int) -> int:
    """Chunks whose [X, N, C, dim] temporaries hold about so many elements as the cache likes."""
    widest = max(key_dim * groups, value_dim, _MAX_CHUNK * groups)
    return max(_SEGMENT_ELEMENTS // (rows * widest * _MAX_CHUNK), 1)


def segment_bound(seq: int, sequences: int, chunks_per_segment: int) -> int:
    """At least the number of segments, in arithmetic that symbolic lengths can do.

    A sequence has at most one partial chunk; chunks below the largest size are at least as long as
    the mean sequence, which makes at most 3 a sequence.
    """
    return (seq // _MAX_CHUNK + 3 * sequences) // chunks_per_segment + 1


class Layout:
    """How tokens map to chunks and segments."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        self.batch, self.seq, self.kv_heads, self.key_dim = k.shape
        self.value_dim = v.shape[3]
        self.groups = q.shape[2] // self.kv_heads
        self.packed = cu_seqlens is not None
        self.sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 1
        self.rows = self.batch * self.kv_heads
        self.bounds = [0, self.seq] if cu_seqlens is None else cu_seqlens.tolist()
        # Empty sequences have no chunk and must not make the others' shorter.
        filled = sum(start < stop for start, stop in zip(self.bounds, self.bounds[1:]))
        mean = max(self.seq // filled, _MIN_CHUNK if self.packed else 1)
        self.chunk = min(1 << (mean - 1).bit_length(), _MAX_CHUNK)
        self.chunks_per_segment = chunks_per_segment(
            self.rows, self.groups, self.key_dim, self.value_dim
        )
        self.dtype, self.device = accumulation_dtype(q.dtype), q.device

    def segments(self) -> list[Segment]:
        chunks = []
        for sequence, (begin, end) in enumerate(zip(self.bounds, self.bounds[1:])):
            for start in range(begin, end, self.chunk):
                stop = min(start + self.chunk, end)
                chunk = Chunk(sequence, start, stop - start, start == begin, stop == end)
                chunks.append(chunk)
        size = self.chunks_per_segment
        groups = [chunks[i : i + size] for i in range(0, len(chunks), size)]
        return [Segment(g, g[0].start, g[-1].start + g[-1].length) for g in groups]

    def gather(self, x: Tensor, segment: Segment) -> Tensor:
        """[B, T, H, ...] -> [X, N, C, ...] of one segment, zeros where a chunk is short."""
        part = x[:, segment.start : segment.stop].to(self.dtype)
        size = len(segment.chunks) * self.chunk
        if part.shape[1] != size:
            padded = part.new_zeros(part.shape[0], size, *part.shape[2:])
            padded[:, self._token_rows(segment)] = part  # the rest stays 0
            part = padded
        return part.transpose(1, 2).contiguous().view(self.rows, -1, self.chunk, *part.shape[3:])

    def scatter(self, x: Tensor, out: Tensor, segment: Segment) -> None:
        """The reverse of gather, into the segment's tokens of out."""
        size = len(segment.chunks) * self.chunk
        part = x.reshape(self.batch, self.kv_heads, size, *out.shape[3:]).transpose(1, 2)
        if segment.stop - segment.start != size:
            part = part[:, self._token_rows(segment)]
        out[:, segment.start : segment.stop] = part

    def _token_rows(self, segment: Segment) -> Tensor | slice:
        """Where the tokens of a segment with short chunks lie among its chunks' rows."""
        if not self.packed:
            # The last chunk alone is short: no index has to travel to the device.
            return slice(segment.stop - segment.start)
        pieces = [
            torch.arange(n * self.chunk, n * self.chunk + c.length)
            for n, c in enumerate(segment.chunks)
        ]
        return torch.cat(pieces).to(self.device)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, heads, dim] -> [B, T, H, G, dim]: query heads beside their kv head."""
        return x.unflatten(2, (self.kv_heads, self.groups))

    def states(self, x: Tensor) -> Tensor:
        """[B or sequences, H, K, V] -> [sequences, X, K, V] in the accumulation dtype."""
        return x.to(self.dtype).reshape(self.sequences, self.rows, self.key_dim, self.value_dim)
