"""Local updates with a late outer step are what the formulas say."""

import pytest
import torch
from co2_cases import on_ranks, on_shards, serial, settled, small_moves, with_a_straggler
from ranks import Ranks
from tolerances import LAYOUT_FLOAT64, ROUNDED_MOVES, assert_close

from transnormer.parallel.co2 import automatic_tau
from transnormer.parallel.outer_config import Method, OuterConfig

METHODS: tuple[Method, ...] = ("local_sgd", "slowmo", "diloco", "co2", "co2_eager")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_methods_are_their_formulas(ranks: Ranks, workers: int, method: Method) -> None:
    config = OuterConfig.of(method, tau=3).model_copy(update={"clip": 0.05})
    dtype = torch.float64 if workers > 2 else torch.float32
    found = ranks.run(workers, on_ranks, config, 14, dtype, False)
    for update, values in enumerate(serial(config, workers, 14, dtype)):
        for worker, expected in enumerate(values):
            if workers <= 2:
                assert torch.equal(found[worker][update], expected), (update, worker)
            else:
                assert_close(found[worker][update], expected, limit=LAYOUT_FLOAT64)


@pytest.mark.parametrize("method", ["diloco", "co2"])
def test_workers_may_share_their_parameters_among_ranks(ranks: Ranks, method: Method) -> None:
    config = OuterConfig.of(method, tau=2)
    exact = ranks.run(2, on_shards, config, 1)
    for rank, found in enumerate(ranks.run(4, on_shards, config, 2)):
        for name, expected in exact[rank // 2].items():
            assert_close(found[name], expected, limit=LAYOUT_FLOAT64, name=name)


def test_a_late_average_moves_nothing_in_the_first_round(ranks: Ranks) -> None:
    config = OuterConfig(tau=2, delayed=True)
    found = ranks.run(2, on_ranks, config, 4, torch.float64, False)
    start = serial(config, 1, 2, torch.float64)[1][0]
    for rank in range(2):
        assert torch.equal(found[rank][1], start)
        assert not torch.equal(found[rank][3], start)


def test_workers_with_equal_data_stay_equal(ranks: Ranks) -> None:
    config = OuterConfig.of("co2_eager", tau=2)
    first, second = ranks.run(2, on_ranks, config, 8, torch.float32, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_update_a_round_is_data_parallel_sgd(ranks: Ranks) -> None:
    config = OuterConfig(tau=1)
    found = ranks.run(2, on_ranks, config, 6, torch.float64, False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_parameters_of_16_bits_keep_moves_smaller_than_their_last_place(ranks: Ranks) -> None:
    for moved in ranks.run(2, small_moves, OuterConfig(tau=2), 40):
        assert moved == pytest.approx(0.1 * 40, rel=ROUNDED_MOVES)


def test_the_clip_clips(ranks: Ranks) -> None:
    free, bound = (
        ranks.run(2, on_ranks, OuterConfig(tau=2, delayed=True, clip=clip), 6, torch.float64, False)
        for clip in (None, 1e-3)
    )
    assert (bound[0][-1] - bound[0][1]).abs().max() <= 2 * 1e-3 * (1 + 1e-9)
    assert (free[0][-1] - free[0][1]).abs().max() > 1e-2


@pytest.mark.parametrize("updates", [5, 6, 7])
@pytest.mark.parametrize("method", ["at_once", "late", "eager"])
def test_nothing_under_way_is_missing_where_workers_would_meet(
    ranks: Ranks, method: str, updates: int
) -> None:
    config = OuterConfig(tau=2, delayed=method != "at_once", eager=method == "eager")
    for found, exact, restored in ranks.run(4, settled, config, updates):
        assert_close(found, exact, limit=LAYOUT_FLOAT64)
        assert restored


def test_a_straggler_is_waited_for_a_round_later(ranks: Ranks) -> None:
    # A step that waited for the slower one would never come to the word that frees it.
    found = ranks.run(2, with_a_straggler, OuterConfig.of("co2", tau=3))
    assert found[1][0] is False
    assert len(found[0]) == 3


@pytest.mark.parametrize("kill_at", [3, 4, 5])
@pytest.mark.parametrize("method", ["co2", "co2_eager"])
def test_a_run_goes_on_bit_for_bit_with_an_all_reduce_under_way(
    ranks: Ranks, method: Method, kill_at: int
) -> None:
    config = OuterConfig.of(method, tau=2)
    whole = ranks.run(2, on_ranks, config, 8, torch.float32, False)
    halves = ranks.run(2, on_ranks, config, 8, torch.float32, False, kill_at)
    for a, b in zip(whole, halves, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_tau_hides_the_all_reduce_with_room_to_spare() -> None:
    assert automatic_tau(1.0, 0.1) == 12
    assert automatic_tau(0.001, 0.1) == 1


def test_tau_lets_a_round_cost_a_small_part_of_itself() -> None:
    update, cost = 0.2, 0.06
    tau = automatic_tau(0.5, update, cost)
    assert tau > automatic_tau(0.5, update)
    assert cost / (tau * update + cost) <= 0.03 < cost / ((tau - 1) * update + cost)
    assert automatic_tau(0.5, update, 0.001) == automatic_tau(0.5, update)
