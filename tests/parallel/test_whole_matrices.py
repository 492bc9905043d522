"""Muon on ranks: the updates of one process, whatever the layout."""

from functools import cache
from typing import Any

import pytest
from parallel_cases import assert_same_training, matrices_worked_on, name_of, train
from ranks import Ranks
from tolerances import LAYOUT_FLOAT64, assert_close

from transnormer.models import zoo
from transnormer.optim import OptimizerConfig
from transnormer.parallel.mesh import Axes

# Ten matrices of several sizes, of more rows than columns and of fewer.
CONFIG = zoo.tnl_custom(vocab_size=23, model_dim=16, num_layers=2, heads=4, glu_dim=12)
# The last rank has one row of some, or none.
UNEVEN = zoo.tnl_custom(vocab_size=23, model_dim=8, num_layers=1, heads=4, glu_dim=9)
MUON = OptimizerConfig(name="muon", lr=1e-2, clip=0.05)


@cache
def alone(steps: int) -> dict[str, Any]:
    return train(None, CONFIG, Axes(), None, range(steps), MUON)


@pytest.mark.parametrize(
    "axes",
    [
        Axes(dp_shard=4),
        Axes(dp_replicate=2, dp_shard=2),
        Axes(dp_replicate=4),
        Axes(dp_shard=2, sp=2),
        Axes(tp=4),
        Axes(dp_shard=2, tp=2),
        Axes(dp_replicate=2, tp=2),
    ],
    ids=name_of,
)
def test_every_layout_makes_the_updates_of_one_process(ranks: Ranks, axes: Axes) -> None:
    assert_same_training(ranks.run(4, train, CONFIG, axes, None, range(3), MUON)[0], alone(3))


def test_ranks_may_hold_nothing_of_a_matrix(ranks: Ranks) -> None:
    exact = train(None, UNEVEN, Axes(), None, range(2), MUON)
    assert_same_training(
        ranks.run(4, train, UNEVEN, Axes(dp_shard=4), None, range(2), MUON)[0], exact
    )


def test_momentum_moves_to_another_layout(ranks: Ranks) -> None:
    start = None
    for axes, steps in ((Axes(dp_shard=2, tp=2), range(1)), (Axes(dp_shard=4), range(1, 2))):
        start = ranks.run(4, train, CONFIG, axes, start, steps, MUON)[0]
    found = train(None, CONFIG, Axes(), start, range(2, 3), MUON)
    exact = alone(3)
    assert_close(found["loss"], exact["loss"][2:], limit=LAYOUT_FLOAT64)
    for name, expected in exact["model"].items():
        assert_close(found["model"][name], expected, limit=LAYOUT_FLOAT64, name=name)


@pytest.mark.parametrize("axes", [Axes(2, 2), Axes(dp_shard=2, tp=2)], ids=name_of)
def test_each_matrix_is_worked_on_once_and_whole(ranks: Ranks, axes: Axes) -> None:
    found = ranks.run(4, matrices_worked_on, CONFIG, axes)
    # Ten matrices, the largest first, dealt out to four ranks.
    assert [len(sizes) for sizes in found] == [3, 3, 2, 2]
    assert found[0][0] == max(size for sizes in found for size in sizes)
