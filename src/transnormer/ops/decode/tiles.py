"""How products of a decoding step are cut into programs: pure functions of shapes, one table."""

from typing import NamedTuple

from transnormer.ops.linear_attention.launch_config import block_of

# Of an H100.
_PROCESSORS = 132
# Bytes of weights that all programs together, and each for a single row, ask for into the L2 cache
# before their inputs are there.
_AHEAD, _ASKED = 12 << 20, 16 << 10


class RowTile(NamedTuple):
    """A program's tile for one row.

    Attributes:
        rows: of the matrix.
        columns: of the matrix, in one turn of the loop.
        warps: of the program.
        ahead: columns that a program asks for, into the L2 cache, before its inputs are there.
    """

    rows: int
    columns: int
    warps: int
    ahead: int


class RowsTile(NamedTuple):
    """A program's tile for several rows.

    Attributes:
        rows: of the matrix.
        columns: of the matrix, in one turn of the loop.
        split: parts that the sum over the inputs is cut into, each a program.
        stages: tiles under way, that at work included.
        warps: of the program.
        ahead: columns of its part that a program asks for before its inputs are there.
    """

    rows: int
    columns: int
    split: int
    stages: int
    warps: int
    ahead: int


# What was measured to be best; other shapes take the rules. By outputs, inputs, rows of the batch (a
# power of two of 16 at least) or, for a single row, bits of a weight, and whether two are multiplied.
MEASURED: dict[tuple[int, int, int, bool], RowsTile] = {
    (8192, 2048, 32, False): RowsTile(64, 128, 2, 4, 4, 256),
    (2048, 2048, 32, False): RowsTile(64, 128, 8, 4, 4, 256),
    (5632, 2048, 32, True): RowsTile(64, 128, 1, 4, 4, 512),
    (2048, 5632, 32, False): RowsTile(64, 128, 4, 4, 4, 0),
    (4096, 1024, 32, False): RowsTile(64, 128, 2, 4, 4, 512),
    (1024, 1024, 32, False): RowsTile(64, 128, 4, 4, 4, 256),
    (2816, 1024, 32, True): RowsTile(64, 64, 2, 6, 4, 512),
    (1024, 2816, 32, False): RowsTile(32, 128, 11, 4, 4, 256),
    (16384, 4096, 32, False): RowsTile(64, 128, 1, 4, 4, 256),
    (4096, 4096, 32, False): RowsTile(64, 128, 4, 4, 4, 0),
    (11008, 4096, 32, True): RowsTile(64, 128, 1, 4, 4, 256),
    (4096, 11008, 32, False): RowsTile(64, 128, 2, 4, 4, 0),
}
MEASURED_ROW: dict[tuple[int, int, int, bool], RowTile] = {
    (16384, 4096, 4, False): RowTile(8, 512, 4, 0),
    (4096, 4096, 4, False): RowTile(16, 512, 4, 0),
    (11008, 4096, 4, True): RowTile(4, 512, 4, 0),
    (4096, 11008, 4, False): RowTile(8, 512, 4, 0),
    (16384, 4096, 8, False): RowTile(4, 1024, 4, 2048),
    (4096, 4096, 8, False): RowTile(16, 1024, 4, 2048),
    (11008, 4096, 8, True): RowTile(4, 1024, 4, 4096),
    (4096, 11008, 8, False): RowTile(8, 1024, 4, 2048),
    (8192, 2048, 16, False): RowTile(2, 1024, 4, 0),
    (2048, 2048, 16, False): RowTile(8, 1024, 4, 2048),
    (5632, 2048, 16, True): RowTile(2, 1024, 4, 0),
    (2048, 5632, 16, False): RowTile(8, 1024, 4, 2048),
    (4096, 1024, 16, False): RowTile(4, 1024, 4, 0),
    (1024, 1024, 16, False): RowTile(4, 1024, 4, 1024),
    (2816, 1024, 16, True): RowTile(4, 1024, 4, 0),
    (1024, 2816, 16, False): RowTile(2, 1024, 4, 2048),
    (16384, 4096, 16, False): RowTile(2, 1024, 4, 2048),
    (4096, 4096, 16, False): RowTile(4, 1024, 4, 0),
    (11008, 4096, 16, True): RowTile(2, 1024, 4, 2048),
    (4096, 11008, 16, False): RowTile(8, 1024, 4, 2048),
}


def tile_of(outputs: int, inputs: int, size: int, double: bool) -> RowTile:
    """The tile of a single row's product.

    About 8 KiB of weights a tile and two tiles on their way: with the four or five programs that
    share an SM of an H100 that is more than bandwidth times latency asks for. Fewer rows where the
    matrix is small, so that there are two programs an SM; each thread has 16 bytes at least. Sums
    of a second matrix leave no registers for longer tiles of int8.

    Args:
        outputs, inputs: of the matrix.
        size: bytes of a weight.
        double: whether there are two matrices.
    """
    if (outputs, inputs, 8 * size, double) in MEASURED_ROW:
        return MEASURED_ROW[outputs, inputs, 8 * size, double]
    columns = min(block_of(inputs), 1024)
    rows = max((8192 if size == 1 and not double else 4096) // columns, 1)
    while rows * columns > 1024 and outputs // rows < 2 * _PROCESSORS:
        rows //= 2
    return RowTile(rows, columns, 4, _ahead(inputs, _ASKED // (rows * size)))


def _ahead(inputs: int, most: int) -> int:
    """The largest power of two of columns up to ``most``, 0 below 64."""
    columns = min(inputs, most)
    return 1 << columns.bit_length() - 1 if columns >= 64 else 0


def tile_of_nibbles(outputs: int, inputs: int, double: bool) -> RowTile:
    """The tile of a single row's product with weights of 4 bits; columns in words of eight.

    Sixteen KiB, since most matrices take one turn: a row of 4,096 weights is 512 words, which are
    16 bytes a thread.
    """
    if (outputs, inputs, 4, double) in MEASURED_ROW:
        return MEASURED_ROW[outputs, inputs, 4, double]
    rows = 4 if double else 8
    while rows > 1 and outputs // rows < 4 * _PROCESSORS:
        rows //= 2
    return RowTile(rows, min(block_of(inputs // 8), 512), 4, 0)


def tile_of_rows(outputs: int, inputs: int, block: int, double: bool) -> RowsTile:
    """The tile of a product of several rows, from the table or by rule.

    Sixty-four rows of the matrix are what a tensor core instruction takes, and each program reads
    all rows of x, which are few beside so many. Where that leaves fewer than two programs an SM the
    sum over the inputs is cut, into parts of a whole number of tiles.

    Args:
        outputs, inputs: of the matrix.
        block: rows of the batch, as a power of two of 16 at least.
        double: whether there are two matrices.
    """
    if (outputs, inputs, block, double) in MEASURED:
        return MEASURED[outputs, inputs, block, double]
    columns = 64 if double or inputs % 128 else 128
    blocks, turns = -(-outputs // 64), inputs // columns
    fitting = [n for n in range(1, 17) if inputs % (n * columns) == 0 and turns // n >= 2]
    wanted = [n for n in fitting if n * blocks <= 2 * _PROCESSORS + 16] or [1]
    split = max(wanted)
    most = _AHEAD // (2 * outputs * (2 if double else 1)) // split
    ahead = _ahead(inputs // split, most)
    return RowsTile(64, columns, split, 4 if block <= 32 else 3, 4, ahead)
