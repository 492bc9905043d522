"""What a process knows about its peers."""

import pytest

from transnormer.parallel import World, current_world

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_alone() -> None:
    assert current_world() == World(rank=0, world_size=1, local_rank=0)


def test_the_launcher_says_where_a_process_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("5", "8", "1")):
        monkeypatch.setenv(name, value)
    assert current_world() == World(rank=5, world_size=8, local_rank=1)


@pytest.mark.parametrize("values", [("0", "2", None), ("2", "2", "0"), ("x", "2", "0")])
def test_half_a_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str | None, ...]
) -> None:
    for name, value in zip(NAMES, values):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="the launcher set RANK="):
        current_world()
