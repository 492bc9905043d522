"""Weights and moments in bfloat16 on several ranks: rounded alike wherever they are the same."""

import pytest
import torch
from ranks import Ranks
from rounded_cases import train_rounded
from tolerances import ROUNDED_WEIGHTS, assert_close

from transnormer.models import zoo
from transnormer.parallel.mesh import Axes

CONFIG = zoo.tnl_custom(vocab_size=23, model_dim=16, num_layers=2, heads=4, glu_dim=12)
NORMED = zoo.llama_custom(vocab_size=23, model_dim=16, num_layers=2, heads=4, glu_dim=12)


@pytest.mark.parametrize(
    "axes",
    [Axes(dp_replicate=2, dp_shard=2), Axes(dp_replicate=2, tp=2), Axes(dp_replicate=4)],
    ids=["fsdp", "tp", "replicas"],
)
def test_copies_stay_the_same_bit_for_bit(ranks: Ranks, axes: Axes) -> None:
    found = ranks.run(4, train_rounded, CONFIG, axes, 3)
    shares = 4 // axes.dp_replicate
    for rank, own in enumerate(found):
        for name, expected in found[rank % shares].items():
            assert torch.equal(own[name], expected), name


def test_weights_that_no_rank_has_a_share_of_stay_the_same(ranks: Ranks) -> None:
    first, *others = ranks.run(4, train_rounded, NORMED, Axes(tp=4), 3)
    names = [name for name in first if "norm.weight" in name]
    assert len(names) > 1
    for other in others:
        for name in names:
            assert torch.equal(other[name], first[name]), name


def test_updates_leave_the_random_numbers_of_a_rank_alone(ranks: Ranks) -> None:
    for own in ranks.run(4, train_rounded, CONFIG, Axes(dp_shard=4), 2):
        assert own["random"]


def test_shares_are_those_of_one_process_but_for_the_rounding(ranks: Ranks) -> None:
    found = ranks.run(4, train_rounded, CONFIG, Axes(dp_shard=4), 3)
    exact = train_rounded(None, CONFIG, Axes(), 3)
    for name in ("blocks.1.token_mixer.out_proj.weight", "embedding.weight"):
        together = torch.cat([own[name] for own in found]).double()
        assert_close(together, exact[name].double(), limit=ROUNDED_WEIGHTS, name=name)
