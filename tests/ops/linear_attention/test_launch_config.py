"""How calls are cut into programs."""

import pytest
import torch

from transnormer.ops.linear_attention import launch_config
from transnormer.ops.linear_attention.launch_config import Gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("rows", "tokens", "segments"),
    [
        (16, 131_072, 8),
        (16, 8192, 4),
        (8, 2048, 1),
        (64, 8192, 1),
        (128, 1 << 20, 1),
        (8, 1 << 20, 16),
        (8, 32_768, 16),
        (32, 8192, 4),
        (32, 4096, 1),
    ],
)
def test_sequences_are_cut_where_heads_leave_processors_idle(
    rows: int, tokens: int, segments: int
) -> None:
    assert launch_config.segments_of(rows, tokens, Gpu()) == segments


@pytest.mark.parametrize(
    ("rows", "tokens", "segments", "pieces"),
    [
        (8, 32_768, 16, 1),
        (32, 8192, 4, 1),
        (8, 32_768, 8, 2),
        (16, 8192, 4, 2),
        (16, 131_072, 8, 4),
    ],
)
def test_pieces_fill_the_processors_or_have_2048_tokens(
    rows: int, tokens: int, segments: int, pieces: int
) -> None:
    assert launch_config.pieces_of(rows, tokens, segments, Gpu()) == pieces


@pytest.mark.parametrize(
    ("rows", "chunk"), [(22, 64), (32, 32), (64, 64), (66, 64), (88, 32), (128, 32)]
)
def test_backward_sweeps_share_processors_unless_rounds_of_one_each_are_fuller(
    rows: int, chunk: int
) -> None:
    tiles = launch_config.sweep_tiles(128, 128, torch.bfloat16, rows, Gpu(), backward=True)
    assert tiles.chunk == chunk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dim", [4, 16, 96, 128, 200, 256, 428, 512])
@pytest.mark.parametrize("value_dim", [4, 64, 100, 512])
@pytest.mark.parametrize("rows", [1, 1000])
def test_tiles_hold_the_dims_in_powers_of_two(
    key_dim: int, value_dim: int, rows: int, dtype: torch.dtype
) -> None:
    for small in (Gpu(), Gpu(84, 101_376)):
        for backward, gated in ((False, False), (True, False), (False, True), (True, True)):
            tiles = launch_config.sweep_tiles(
                key_dim, value_dim, dtype, rows, small, backward=backward, gated=gated
            )
            assert tiles.key_block >= key_dim
            for size in (tiles.chunk, tiles.key_block, tiles.value_block, tiles.warps):
                assert size & (size - 1) == 0
            assert min(tiles.chunk, tiles.key_block, tiles.value_block) >= 16
            # q, k and v of the chunks under way; products of registers take one buffer less.
            wide = 2 * tiles.key_block + tiles.value_block
            loads = (tiles.stages - 1) * tiles.chunk * wide * dtype.itemsize
            assert loads <= small.shared_memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dim", [4, 16, 96, 128, 200, 256])
@pytest.mark.parametrize("value_dim", [4, 64, 100, 512])
def test_tiles_for_gates_share_a_chunk_and_are_powers_of_two(
    key_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    for small in (Gpu(), Gpu(84, 101_376)):
        tiles = launch_config.gated_tiles(key_dim, value_dim, dtype, small)
        assert {tile.chunk for tile in tiles} == {tiles.chunk}
        assert tiles.sweep.key_block >= key_dim
        for tile in tiles:
            sizes = [tile.chunk, tile.key_block, tile.value_block or 16]
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
