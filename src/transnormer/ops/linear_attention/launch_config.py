"""How calls are cut into programs: static tables, measured once, never tuned at run time."""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Shape of a program's work."""

    chunk: int
    key_block: int
    value_block: int
    warps: int
    stages: int


def block_of(dim: int, least: int = 16) -> int:
    """The power of two that holds ``dim``, at least the 16 that a matrix product needs."""
    return max(least, 1 << (dim - 1).bit_length())


class Gpu(NamedTuple):
    """What the choice of tiles and cuts depends on; the defaults are an H100's."""

    processors: int = 132
    shared_memory: int = 232_448  # bytes that one program may have


def sweep_tiles(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    rows: int,
    gpu: Gpu,
    *,
    backward: bool = False,
    gated: bool = False,
) -> Tiles:
    """Tiles of a sweep with these dims, ``rows`` = units * heads of them.

    The state of a program, value_block x key_block in float32, lies in its registers; the tiles of
    the ``stages`` chunks under way lie in shared memory. Chunks of 32 leave room for two programs
    a processor, which hide each other's waits; chunks of 64 take fewer steps where there is but
    one. A backward pass has three sweeps a row. float32 products are three tf32 products each, whose
    operands need registers.

    The backward pass of scalar gates (gated) loads one more tile of keys and one of a state a
    chunk, and writes a state a chunk, so that long chunks mean less to write.
    """
    block, values = block_of(key_dim), block_of(value_dim)
    if gated and backward and block <= 256 and dtype != torch.float32:
        if block == 256:
            return Tiles(16, block, min(values, 32), 4, 2)
        if gpu.shared_memory < 131_072:
            return Tiles(32, block, min(values, 64), 4, 1)
        # Measured: a third stage at 128 takes a fifth longer.
        return Tiles(64, block, min(values, 64), 4, 2 if block == 128 else 3)
    if dtype == torch.float32:
        chunk, most, warps = (32, 32, 8) if block <= 64 else (16, 32 if block == 128 else 16, 8)
        return Tiles(chunk, block, min(values, most), warps, 2)
    if block <= 64:
        return Tiles(64, block, min(values, 64), 4, 3 if backward else 4)
    if block == 128:
        programs = rows * -(-value_dim // 64) * (3 if backward else 1)
        alone = programs <= gpu.processors
        if backward:
            # Measured: alone on a processor, a program takes three fifths of the time that each of
            # two takes; so it matters how full the last round of programs is.
            rounds, of_two = -(-programs // gpu.processors), -(-programs // (2 * gpu.processors))
            alone = 3 * rounds < 5 * of_two
        if alone and gpu.shared_memory >= 131_072:
            # Measured: the masks and factors of scalar gates fit in registers at chunks of 32 only.
            return Tiles(32 if gated else 64, block, min(values, 64), 4, 3)
        return Tiles(32, block, min(values, 64), 4, 5 if backward else 4)
    if block == 256 and dtype == torch.bfloat16:
        return Tiles(16, block, min(values, 64), 4, 3)
    if block == 256:
        return Tiles(16, block, min(values, 32), 4, 2)
    return Tiles(16, block, 16, 8, 2)


def local_state_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, gpu: Gpu) -> Tiles:
    """Tiles of the kernel that sums what a segment adds to the state; key_dim up to 256."""
    block, values = block_of(key_dim), block_of(value_dim)
    if dtype == torch.float32:
        return Tiles(
            32 if block <= 128 else 16, block, min(values, 64 if block <= 128 else 32), 8, 2
        )
    if block <= 64:
        return Tiles(64, block, min(values, 64), 4, 3)
    if block == 128:
        # Registers hold one program a processor, whose waits only its own loads can hide.
        stages = 4 if gpu.shared_memory >= 147_456 else 3
        return Tiles(64, block, min(values, 128), 8 if values >= 128 else 4, stages)
    return Tiles(64, block, min(values, 64), 8, 2)


def gradient_tiles(key_dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel for log_decay's gradient, which holds two states; key_dim up to 256."""
    block, values = block_of(key_dim), block_of(value_dim)
    if dtype == torch.float32 and block > 64:
        return Tiles(16, block, 16, 4 if block == 128 else 8, 1)
    return Tiles(32 if block <= 128 else 16, block, min(values, 32), 4 if block <= 128 else 8, 1)


def segments_of(rows: int, tokens: int, gpu: Gpu) -> int:
    """Segments that a sequence is cut into, given rows = sequences * heads of them.

    One program works on one head of one segment. Segments cost two more launches and a second read
    of the tokens whose state they hand on (fewer where decay is strong), so there are as many as
    give each processor work, two programs each where they have 2,048 tokens, none of less than
    1,024 tokens, and never two: half the length does not pay for the pass before. Powers of two:
    few cases.
    """
    segments = 1
    while segments * 2 * 1024 <= tokens:
        full = gpu.processors if tokens >= segments * 2 * 2048 else gpu.processors // 2
        if segments * 2 * rows > full:
            break
        segments *= 2
    return segments if segments > 2 else 1


def pieces_of(rows: int, tokens: int, segments: int, gpu: Gpu) -> int:
    """Pieces of a segment, each of which a program sums for the state that the segment hands on.

    A piece costs a state written and read. So there are as many as have a processor each (the last
    segments hand nothing on), or 2,048 tokens each: then it is little, and evens out that strong
    decay lets many programs skip most of their tokens. At most 4.
    """
    pieces = 1
    while pieces < 4:
        programs = rows * (segments - 1) * pieces * 2
        if programs > gpu.processors and tokens < segments * pieces * 2 * 2048:
            break
        pieces *= 2
    return pieces


def packed_length(heads: int, tokens: int, gpu: Gpu) -> int:
    """Tokens a segment of packed sequences: no more segments of all heads than processors.

    Documents are cut by their own ends as well. Measured with documents of 128 to 8,192 tokens on
    average: four times as many cost 4 to 34 % more, in states and in programs' beginnings.
    """
    length = 256
    while length < 1 << 20 and tokens * heads > gpu.processors * length:
        length *= 2
    return length


# So many programs that write the states of gates fit a processor at a time.
STATE_PROGRAMS = 3


class GatedTiles(NamedTuple):
    """Tiles of the kernels for gates; ``chunk`` is the same in all of them."""

    gates: Tiles
    sweep: Tiles
    states: Tiles
    values: Tiles
    keys: Tiles
    levels: Tiles  # of what keys leaves; both key_blocks divide that of gates or hold key_dim

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.gates.chunk


def gated_tiles(key_dim: int, value_dim: int, dtype: torch.dtype, gpu: Gpu) -> GatedTiles:
    """Tiles for gates with these dims; key_dim up to 256, value_dim up to 512.

    Long chunks mean fewer states to write, short ones fewer registers. Four warps are what the
    products of a chunk of 64 occupy; more would do the same work twice.
    """
    block, values = block_of(key_dim), block_of(value_dim)
    if dtype == torch.float32:
        chunk, half = (32, 32) if block <= 64 else (16, 16 if block == 256 else 32)
        return GatedTiles(
            gates=Tiles(chunk, min(block, 64), 0, 4, 1),
            sweep=Tiles(chunk, block, min(values, half), 8, 2),
            states=Tiles(chunk, min(block, 64), min(values, 64), 4, 2),
            values=Tiles(chunk, min(block, 64), min(values, 64), 4, 2),
            keys=Tiles(chunk, min(block, 64), min(values, 32), 4, 2),
            levels=Tiles(chunk, min(block, 64), min(values, 32), 4, 2),
        )
    chunk, stages = 64 if block <= 128 else 32, 3 if block <= 128 else 2
    if gpu.shared_memory < 196_608:
        stages = 1
    # States of float16 are float32: shared memory holds fewer of them.
    ahead = 2 if stages == 3 and dtype == torch.bfloat16 else 1
    # Blocks of 32 key dims leave no number of the gradient kernels outside registers. Two widths in
    # shared memory, and values in a single block, are what ptxas 12.8 makes wrong addresses of
    # (tests/gpu/sass.py): one width there.
    keys = Tiles(chunk, 32, 64 if value_dim > 64 else 32, 4, 2)
    if chunk == 32:
        most = 64 if dtype == torch.bfloat16 else 32
        keys = Tiles(chunk, most, min(values, 64), 4, 2)
    return GatedTiles(
        gates=Tiles(chunk, min(block, 64), 0, 4, 1),
        sweep=Tiles(chunk, block, min(values, 64), 4, stages),
        states=Tiles(chunk, min(block, 64), min(values, 64), 4, 3),
        values=Tiles(chunk, min(block, 128), min(values, 64), 4, ahead),
        keys=keys,
        levels=keys._replace(key_block=32),
    )
