"""Training on a mesh of ranks is training in one process: losses, gradients, updates, checkpoints."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from parallel_cases import assert_same_training, logits_on_ranks, scored_on_ranks, train
from ranks import Ranks
from tolerances import LAYOUT_FLOAT64, assert_close

from transnormer.eval.perplexity import score_tokens
from transnormer.models import zoo
from transnormer.models.decoder import BlockConfig, Decoder, DecoderConfig
from transnormer.nn.channel_mixers import FfnConfig, GluConfig
from transnormer.nn.token_mixers import LightningConfig, SoftmaxConfig
from transnormer.optim import OptimizerConfig
from transnormer.parallel.mesh import Axes

CONFIG = zoo.tnl_custom(vocab_size=23, model_dim=16, num_layers=2, heads=4, glu_dim=12)
# Clips every step.
ADAMW = OptimizerConfig(lr=1e-2, clip=0.05)


@cache
def alone(steps: int) -> dict[str, Any]:
    """What one process finds; found once."""
    return train(None, CONFIG, Axes(), None, range(steps), ADAMW)


# With micro-batches in the fast suite: every axis once.
IN_PARTS = (Axes(dp_replicate=2, dp_shard=2), Axes(sp=4), Axes(dp_shard=2, tp=2))
ALL_AXES = (
    Axes(dp_shard=4),
    Axes(dp_replicate=2, dp_shard=2),
    Axes(dp_replicate=4),
    Axes(dp_shard=2, sp=2),
    Axes(dp_replicate=2, sp=2),
    Axes(sp=4),
    Axes(tp=4),
    Axes(dp_shard=2, tp=2),
    Axes(dp_replicate=2, tp=2),
    Axes(sp=2, tp=2),
)


def layouts() -> Iterator[Any]:
    for axes in ALL_AXES:
        name = "-".join(f"{name}{n}" for name, n in axes._asdict().items() if n > 1)
        yield pytest.param(axes, 1, id=f"{name}-whole")
        marks = () if axes in IN_PARTS else pytest.mark.slow
        yield pytest.param(axes, 2, id=f"{name}-micro_batches", marks=marks)


@pytest.mark.parametrize(("axes", "parts"), list(layouts()))
def test_every_layout_trains_as_one_process(ranks: Ranks, axes: Axes, parts: int) -> None:
    found = ranks.run(4, train, CONFIG, axes, None, range(3), ADAMW, parts)
    assert_same_training(found[0], alone(3))
    held = axes.ranks // axes.dp_replicate
    whole = found[0]["model"]
    total = sum(result["local"] for result in found[:held])
    assert total == sum(x.numel() for x in whole.values())


def test_a_run_goes_on_in_another_layout(ranks: Ranks) -> None:
    start = None
    for axes, steps in ((Axes(dp_shard=2, tp=2), range(1)), (Axes(2, 1, 2), range(1, 2))):
        start = ranks.run(4, train, CONFIG, axes, start, steps, ADAMW)[0]
    found = train(None, CONFIG, Axes(), start, range(2, 3), ADAMW)
    exact = alone(3)
    assert_close(found["loss"], exact["loss"][2:], limit=LAYOUT_FLOAT64)
    for name, expected in exact["model"].items():
        assert_close(found["model"][name], expected, limit=LAYOUT_FLOAT64, name=name)


def test_untied_biased_and_softmax_layers_share_their_heads(ranks: Ranks) -> None:
    lightning = LightningConfig(heads=4, gate="low_rank", bias=True, gate_position="before_norm")
    blocks = (
        BlockConfig(token_mixer=lightning, channel_mixer=FfnConfig(hidden_dim=8, bias=True)),
        BlockConfig(
            token_mixer=SoftmaxConfig(heads=8, kv_heads=4), channel_mixer=GluConfig(hidden_dim=12)
        ),
    )
    config = DecoderConfig(vocab_size=23, model_dim=16, tie_embeddings=False, blocks=blocks)
    exact = train(None, config, Axes(), None, range(2), ADAMW)
    for axes in (Axes(tp=4), Axes(sp=2, tp=2)):
        assert_same_training(ranks.run(4, train, config, axes, None, range(2), ADAMW)[0], exact)


def test_logits_on_ranks_are_those_of_one_process(ranks: Ranks) -> None:
    torch.manual_seed(3)
    model = Decoder(CONFIG).double().eval()
    ids = torch.arange(30).view(2, 15) % 23
    exact = model(ids).logits.detach()
    for found in ranks.run(4, logits_on_ranks, model, ids):
        assert_close(found, exact, limit=LAYOUT_FLOAT64)


def test_axes_that_do_not_fit_the_processes_are_refused(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="6 ranks; expected as many as the 4 processes"):
        ranks.run(4, train, CONFIG, Axes(dp_shard=3, sp=2), None, range(1), ADAMW)


def test_a_model_whose_parameters_are_shared_is_scored_as_one_process_scores_it(
    ranks: Ranks,
) -> None:
    config = zoo.tnl_custom(vocab_size=23, model_dim=16, num_layers=2, heads=4, glu_dim=12)
    torch.manual_seed(0)
    model, ids = Decoder(config).double(), list(range(1, 20))
    exact = score_tokens(model, [ids], first_id=0)[0].nats
    for found in ranks.run(4, scored_on_ranks, model, ids):
        assert found == pytest.approx(exact, rel=LAYOUT_FLOAT64)
