"""A loss spike sends all processes of a run back to the same snapshot, as it does one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from rollback_cases import run_with_spikes
from tolerances import RELAID_LOSS
from train_cases import tiny_run

from transnormer.models import checkpoint
from transnormer.parallel.mesh import Axes
from transnormer.train import RunConfig


def config_of(folder: Path, name: str, *overrides: str) -> RunConfig:
    return tiny_run(
        folder, "model.dropout=0.0", "train.eval_every=0", "train.steps=12", "guard.window=8",
        "guard.action=rollback", "guard.threshold=12", "guard.snapshot_every=4",
        f"output.dir={folder / name}", *overrides,
    )  # fmt: skip


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(found: Path, exact: Path) -> None:
    assert len(rows(found)) == len(rows(exact))
    for ours, wanted in zip(rows(found), rows(exact), strict=True):
        for name in ("step", "action", "from_step", "next_sample", "tokens"):
            assert ours.get(name) == wanted.get(name), name
        if "loss" in wanted:
            assert abs(ours["loss"] - wanted["loss"]) <= RELAID_LOSS * wanted["loss"]
    weights = [checkpoint.load(run).state_dict() for run in (found, exact)]
    for name, expected in weights[1].items():
        torch.testing.assert_close(weights[0][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "axes",
    [Axes(dp_shard=2, sp=2), pytest.param(Axes(dp_replicate=2, tp=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_all_go_back_to_the_snapshot_of_one_process(
    ranks: Ranks, tmp_path: Path, axes: Axes
) -> None:
    # The second spike comes before another snapshot.
    spikes = (9, 10)
    config = config_of(tmp_path, "alone")
    assert run_with_spikes(None, config, Axes(), spikes) == 12
    assert sum("action" in row for row in rows(tmp_path / "alone")) == 2
    config = config_of(tmp_path, "many")
    assert ranks.run(4, run_with_spikes, config, axes, spikes) == [12] * 4
    compare(tmp_path / "many", tmp_path / "alone")


@pytest.mark.parametrize("first", ["alone", "many"])
def test_a_run_that_is_laid_out_anew_rolls_back_to_where_it_was_stopped(
    ranks: Ranks, tmp_path: Path, first: str
) -> None:
    axes, spikes = Axes(dp_shard=4), (10,)
    stopped, config = config_of(tmp_path, "run", "train.steps=10"), config_of(tmp_path, "run")
    if first == "alone":
        run_with_spikes(None, stopped, Axes(), ())
        ranks.run(4, run_with_spikes, config, axes, spikes, True)
    else:
        ranks.run(4, run_with_spikes, stopped, axes, ())
        run_with_spikes(None, config, Axes(), spikes, True)
    back = next(row for row in rows(tmp_path / "run") if "action" in row)
    assert (back["step"], back["from_step"]) == (10, 11)
