"""How products of a step are cut: the rule at the sizes of the zoo, and the table before it."""

import pytest

from transnormer.models import zoo
from transnormer.ops.decode import tiles
from transnormer.ops.decode.tiles import RowsTile, RowTile, tile_of, tile_of_nibbles, tile_of_rows


def matrices(name: str) -> list[tuple[int, int, bool]]:
    """Outputs and inputs of a layer's matrices, and whether two are multiplied."""
    config = zoo.get(name)
    dim, hidden = config.model_dim, config.blocks[0].channel_mixer.hidden_dim
    return [(4 * dim, dim, False), (dim, dim, False), (hidden, dim, True), (dim, hidden, False)]


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("name", ["tnl-385m", "tnl-1b", "tnl-7b"])
def test_parts_are_whole_tiles_and_leave_no_program_without_company(
    monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(tiles, "MEASURED", {})
    for outputs, inputs, double in matrices(name):
        tile = tile_of_rows(outputs, inputs, block, double)
        assert inputs % (tile.split * tile.columns) == 0
        assert outputs % tile.rows == 0
        assert 0 <= tile.ahead <= inputs // tile.split
        assert 64 <= outputs // tile.rows * tile.split <= 280
        # What stages hold of W and x fits an SM twice.
        held = tile.columns * (tile.rows * (1 + double) + block) * 2 * tile.stages
        assert held <= 113 * 1024


def test_measured_tiles_are_whole() -> None:
    for (outputs, inputs, _, _), tile in tiles.MEASURED.items():
        assert inputs % (tile.split * tile.columns) == 0
        assert outputs % tile.rows == 0


def test_what_was_measured_goes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    known = RowsTile(32, 64, 2, 3, 4, 0)
    monkeypatch.setattr(tiles, "MEASURED", {(96, 128, 32, False): known})
    assert tile_of_rows(96, 128, 32, False) == known
    assert tile_of_rows(96, 128, 32, True) != known
    row = RowTile(2, 64, 4, 0)
    monkeypatch.setattr(tiles, "MEASURED_ROW", {(96, 128, n, False): row for n in (4, 16)})
    assert tile_of(96, 128, 2, False) == tile_of_nibbles(96, 128, False) == row
    assert tile_of(96, 128, 1, False) != row


@pytest.mark.parametrize("double", [False, True])
def test_a_single_rows_tiles_give_every_thread_sixteen_bytes(double: bool) -> None:
    for outputs, inputs in [(16384, 4096), (4096, 11008), (1024, 1024), (61, 64)]:
        for size in (1, 2, 4):
            tile = tile_of(outputs, inputs, size, double)
            assert tile.rows * tile.columns >= min(1024, inputs)
            assert tile.ahead in (0, *(1 << n for n in range(6, 15)))
            assert tile.ahead <= inputs
        assert tile_of_nibbles(outputs, inputs, double).columns <= 512
