"""The plan's formulas agree with torch's tracker, and its layouts fit."""

import json

import pytest

from transnormer.cli.app import run
from transnormer.models import zoo
from transnormer.models.recompute import Checkpointing
from transnormer.parallel.mesh import Axes
from transnormer.parallel.plan import Machine, layouts, memory_of
from transnormer.parallel.plan_exact import measured_memory

slow = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "axes", "tokens", "checkpointing"),
    [
        ("tnl-1b", Axes(dp_shard=8), 8192, "full"),
        pytest.param("tnl-1b", Axes(dp_shard=8), 8192, "none", marks=slow),
        pytest.param("tnl-1b", Axes(dp_shard=8, tp=2), 8192, "full", marks=slow),
        pytest.param("tnl-1b", Axes(dp_shard=4, tp=4), 8192, "none", marks=slow),
        pytest.param("tnl-7b", Axes(dp_shard=8), 8192, "full", marks=slow),
        pytest.param("tnl-7b", Axes(dp_shard=8), 2048, "none", marks=slow),
        pytest.param("tnl-7b", Axes(dp_shard=2, tp=4), 8192, "full", marks=slow),
        pytest.param("tnl-175b", Axes(dp_shard=256), 4096, "full", marks=slow),
        pytest.param("tnl-175b", Axes(dp_shard=32, tp=8), 8192, "full", marks=slow),
        pytest.param("hgrn2-1b", Axes(dp_shard=8), 8192, "none", marks=slow),
        pytest.param("llama-7b", Axes(dp_shard=8), 4096, "none", marks=slow),
    ],
    ids=str,
)
def test_the_formula_is_within_a_tenth_of_the_tracker(
    name: str, axes: Axes, tokens: int, checkpointing: Checkpointing
) -> None:
    config = zoo.get(name)
    exact = measured_memory(config, axes, tokens, checkpointing)["total"]
    assert memory_of(config, axes, tokens, checkpointing).total == pytest.approx(exact, rel=0.1)


def test_the_tracker_follows_layers_on_ranks() -> None:
    config = zoo.tnl_custom(vocab_size=512, model_dim=256, num_layers=3, heads=4, glu_dim=704)
    whole, shared, cut = (
        measured_memory(config, axes, 8192, "none", cut_residual=cut)
        for axes, cut in ((Axes(), False), (Axes(tp=4), False), (Axes(tp=4), True))
    )
    assert shared["sharded_param"] == pytest.approx(whole["sharded_param"] / 4, rel=0.01)
    assert cut["total"] < 0.85 * shared["total"] < 0.6 * whole["total"]


def test_layouts_fit_and_the_fastest_is_first() -> None:
    plans = layouts(zoo.get("tnl-7b"), 16, 8192, Machine(memory=40e9))
    assert plans
    for plan in plans:
        assert plan.axes.ranks == 16
        assert plan.memory.total < 40e9
        assert plan.tokens == plan.rows * 8192 * plan.axes.dp_replicate * plan.axes.dp_shard
    rates = [plan.tokens / plan.seconds for plan in plans]
    assert rates == sorted(rates, reverse=True)
    assert not layouts(zoo.get("tnl-7b"), 1, 8192, Machine(memory=40e9))


@pytest.mark.parametrize("name", ["hybrid-410m", "lightnet-1b"])
def test_models_of_other_kinds_have_layouts(name: str) -> None:
    config = zoo.get(name)
    plans = layouts(config, 8, 8192)
    assert {plan.axes.tp for plan in plans} >= {1, 2}
    for plan in plans:
        assert plan.memory.total < 80e9
        assert 0 < plan.mfu <= Machine().efficiency * (1 + 1e-9)
        assert (plan.sent["sp"] > 0) == (plan.axes.sp > 1)


def test_a_bidirectional_model_of_another_kind_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="causal is False; expected a causal model"):
        layouts(zoo.get("llama-7b").model_copy(update={"causal": False}), 8, 2048)


def test_the_command_lists_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "tnl-1b", "--gpus", "4", "--show", "2", "--json"]
    assert run(command) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(facts["layouts"]) == 2
    assert facts["layouts"][0]["memory"]["total"] < 80e9
    assert run(["plan", "--model", "tnl-175b", "--gpus", "1"]) == 2
    assert "has no layout on 1 devices of 80 GB" in capsys.readouterr().err
