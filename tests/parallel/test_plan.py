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
    ("name", "ranks", "tokens", "checkpointing"),
    [
        ("tnl-1b", 8, 8192, "full"),
        pytest.param("tnl-1b", 8, 8192, "none", marks=slow),
        pytest.param("tnl-7b", 8, 8192, "full", marks=slow),
        pytest.param("tnl-7b", 8, 2048, "none", marks=slow),
        pytest.param("tnl-175b", 256, 4096, "full", marks=slow),
    ],
)
def test_the_formula_is_within_a_tenth_of_the_tracker(
    name: str, ranks: int, tokens: int, checkpointing: Checkpointing
) -> None:
    config, axes = zoo.get(name), Axes(dp_shard=ranks)
    exact = measured_memory(config, axes, tokens, checkpointing)["total"]
    assert memory_of(config, axes, tokens, checkpointing).total == pytest.approx(exact, rel=0.1)


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


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"blocks\[0\] is 'softmax'"):
        layouts(zoo.get("llama-7b"), 8, 2048)


def test_the_command_lists_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "tnl-1b", "--gpus", "4", "--show", "2", "--json"]
    assert run(command) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(facts["layouts"]) == 2
    assert facts["layouts"][0]["memory"]["total"] < 80e9
    assert run(["plan", "--model", "tnl-175b", "--gpus", "1"]) == 2
    assert "has no layout on 1 devices of 80 GB" in capsys.readouterr().err
