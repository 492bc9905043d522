"""Runs whose copies update on their own: what they train, keep, evaluate and go on from."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from co2_cases import (
    Told,
    norms_of_copies,
    order_of_a_checkpoint,
    run_copies,
    run_on_a_full_disk,
    tau_by_a_clock,
    train_copies,
)
from ranks import Ranks
from tolerances import LAYOUT_FLOAT64, RELAID_LOSS, assert_close
from train_cases import assert_same_checkpoint, constant_evaluation, tiny_run

from transnormer.models import checkpoint
from transnormer.models.decoder import BlockConfig, DecoderConfig
from transnormer.nn.channel_mixers import FfnConfig
from transnormer.nn.token_mixers import LightningConfig
from transnormer.parallel import local_layout
from transnormer.parallel.outer_config import OuterTable
from transnormer.parallel.parallel_config import ParallelConfig
from transnormer.train import OneProcess, RunConfig, run_training

# Biases behind sums over ranks are what several ranks of a copy hold.
BLOCK = BlockConfig(
    token_mixer=LightningConfig(heads=4, bias=True),
    channel_mixer=FfnConfig(hidden_dim=8, bias=True),
)
SMALL = DecoderConfig(vocab_size=23, model_dim=16, blocks=(BLOCK, BLOCK))
CO2 = ("parallel.outer.method=co2", "parallel.outer.tau=3")


def folder(tmp_path: Path, name: str, *overrides: str) -> RunConfig:
    fixed = ("optimizer.schedule=constant", f"output.dir={tmp_path / name}")
    return tiny_run(tmp_path, *fixed, *overrides)


def rows(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "tokens_per_second", "outer_exposed")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


@pytest.mark.parametrize(
    ("method", "axes"),
    [
        ("co2", ("parallel.dp_replicate=2",)),
        pytest.param("co2_eager", ("parallel.dp_replicate=4",), marks=pytest.mark.slow),
        pytest.param(
            "diloco", ("parallel.dp_replicate=2", "parallel.tp=2"), marks=pytest.mark.slow
        ),
    ],
    ids=["co2-sharded", "eager-replicated", "diloco-tensor_parallel"],
)
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_round(
    ranks: Ranks, tmp_path: Path, method: str, axes: tuple[str, ...]
) -> None:
    table = (f"parallel.outer.method={method}", "parallel.outer.tau=3", *axes)
    runs = {}
    for name, stages in {"whole": (7,), "parts": (4, 7)}.items():
        for steps in stages:
            config = folder(tmp_path, name, *table, f"train.steps={steps}", "train.eval_every=3")
            runs[name] = ranks.run(4, run_copies, config, steps > stages[0])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert rows(parts) == rows(whole)
    assert_same_checkpoint(*(path / "checkpoints/step_00000007" for path in (parts, whole)))
    assert len(list((whole / "checkpoints/step_00000007/copies").iterdir())) == 4
    assert not any("begin a round" in message for message in runs["parts"][0].messages)


def test_copies_train_alone_and_their_mean_is_evaluated_and_kept(
    ranks: Ranks, tmp_path: Path
) -> None:
    class Copy(OneProcess):
        """A process that reads its rows alone."""

        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.world_size, self.process = rank, 4, 0

    steps = ("train.steps=3", "model.dropout=0.0")
    alone = []
    for rank in range(4):
        config = folder(tmp_path, f"alone{rank}", *steps)
        done = run_training(config, evaluate=constant_evaluation, sync=Copy(rank))
        alone.append(checkpoint.load(done.run_dir))
    table = ("parallel.dp_replicate=4", "parallel.outer.method=co2", "parallel.outer.tau=9")
    told: list[Told] = ranks.run(4, run_copies, folder(tmp_path, "many", *steps, *table), False)
    mean = checkpoint.load(tmp_path / "many")
    states = [model.state_dict() for model in alone]
    for name, x in mean.state_dict().items():
        expected = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    exact = mean.eval()(torch.arange(8)[None]).logits.detach()
    for rank in told:
        assert torch.equal(rank.logits[-1], told[0].logits[-1])
        torch.testing.assert_close(rank.logits[-1], exact)


def test_evaluating_and_saving_change_nothing(ranks: Ranks, tmp_path: Path) -> None:
    table = (*CO2, "parallel.dp_replicate=2", "train.steps=5")
    often = ("train.eval_every=1", "train.save_every=1")
    for name, more in {"seldom": (), "often": often}.items():
        ranks.run(4, run_copies, folder(tmp_path, name, *table, *more), False)
    assert rows(tmp_path / "often") == rows(tmp_path / "seldom")


def test_the_record_tells_of_every_outer_step(ranks: Ranks, tmp_path: Path) -> None:
    config = folder(tmp_path, "many", *CO2, "parallel.dp_replicate=2", "train.steps=9")
    ranks.run(4, run_copies, config, False)
    found = rows(tmp_path / "many")
    assert [row.get("outer_round") for row in found] == [
        None,
        None,
        1,
        None,
        None,
        2,
        None,
        None,
        3,
    ]
    # Nothing moves in the first round, and the second step is the first move.
    gaps = [row["staleness_gap"] for row in found[2::3]]
    assert gaps[:2] == [1.0, 1.0]
    assert gaps[2] > 1.0
    lines = [json.loads(x) for x in (tmp_path / "many/metrics.jsonl").read_text().splitlines()]
    assert [type(row["outer_exposed"]) for row in lines[2::3]] == [bool] * 3


def test_another_layout_begins_a_round_from_the_mean(ranks: Ranks, tmp_path: Path) -> None:
    def config(name: str, copies: int, steps: int) -> RunConfig:
        own = (f"parallel.dp_replicate={copies}", f"train.steps={steps}", "model.dropout=0.0")
        return folder(tmp_path, name, *CO2, *own)

    ranks.run(4, run_copies, config("two", 2, 5), False)
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    told = ranks.run(4, run_copies, config("two", 4, 6), True)
    assert any("begin a round from their mean" in message for message in told[0].messages)
    alone = config("alone", 4, 6)
    run_training(alone, resume=True, evaluate=constant_evaluation, sync=OneProcess())
    found, exact = (rows(tmp_path / name)[5]["loss"] for name in ("two", "alone"))
    assert abs(found - exact) <= RELAID_LOSS * exact


@pytest.mark.parametrize(("what", "rank"), [("copies", 2), ("model", 0)], ids=["copies", "model"])
def test_a_full_disk_of_any_rank_ends_the_run_with_its_last_checkpoint(
    ranks: Ranks, tmp_path: Path, what: str, rank: int
) -> None:
    config = folder(tmp_path, "many", *CO2, "parallel.dp_replicate=4", "train.save_every=2")
    told = ranks.run(4, run_on_a_full_disk, config, what)
    last = tmp_path / "many/checkpoints/step_00000002"
    for text in told:
        assert f"checkpoint of step 4 cannot be written: rank {rank}: " in text
        assert "No space left on device" in text
        assert f"the last good checkpoint is {last}" in text
    assert list(last.parent.iterdir()) == [last]


def test_copies_judge_one_norm(ranks: Ranks) -> None:
    found = ranks.run(4, norms_of_copies, [3.0, 1.0])
    assert [x.item() for x in found] == [pytest.approx(5.0**0.5)] * 4
    assert all(x.isnan() for x in ranks.run(4, norms_of_copies, [3.0, math.nan]))


def test_tau_is_found_once_and_kept(ranks: Ranks, tmp_path: Path) -> None:
    table = ("parallel.dp_replicate=2", "parallel.outer.method=co2", "parallel.outer.tau=auto")
    for steps in (21, 26):
        config = folder(tmp_path, "many", *table, f"train.steps={steps}")
        # The slowest link decides for all; later measurements would not be asked for.
        told = ranks.run(4, run_copies, config, steps > 21, (3, 2, 5, 4))
        notes = [message for message in told[0].messages if "outer.tau is 5" in message]
        assert len(notes) == (steps == 21)
    found = {row["step"]: row["outer_tau"] for row in rows(tmp_path / "many") if "outer_tau" in row}
    assert found == {12: 5, 17: 5, 22: 5}


@pytest.mark.slow
def test_tau_is_corrected_by_what_rounds_cost(ranks: Ranks, tmp_path: Path) -> None:
    table = ("parallel.dp_replicate=4", "parallel.outer.method=co2", "parallel.outer.tau=auto")
    config = folder(tmp_path, "many", *table, "train.steps=68", "train.eval_every=1")
    notes = ranks.run(4, tau_by_a_clock, config)[0]
    assert "outer.tau is 3: an all-reduce took 2e+03 ms here, an update 1e+03 ms" in notes[0]
    # An outer step of 1.1 s, and three updates that take 0.1 s more.
    assert "outer.tau is 46 from here on" in notes[1]
    assert "costs 1.4e+03 ms here, 1.1e+03 ms of it the outer step" in notes[1]
    found = {row["step"]: row["outer_tau"] for row in rows(tmp_path / "many") if "outer_tau" in row}
    assert found == {12: 3, 15: 3, 18: 3, 21: 3, 67: 46}


def test_a_late_all_reduce_leaves_the_updates_their_multiprocessors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Options:
        def __init__(self) -> None:
            self.config = SimpleNamespace(max_ctas=None)

    given = []

    def groups(lists: list[list[int]], pg_options: Any) -> Any:
        given.append(pg_options)
        return dist.ProcessGroup(0, 1), []

    fake = SimpleNamespace(
        ProcessGroupNCCL=SimpleNamespace(Options=Options),
        ProcessGroup=dist.ProcessGroup,
        new_subgroups_by_enumeration=groups,
    )
    monkeypatch.setattr(local_layout, "dist", fake)
    for device, late in (("cuda", True), ("cuda", False), ("cpu", True)):
        options = local_layout._options(torch.device(device), late=late)
        local_layout._own_group([[0, 1]], options)
    assert given[0].config.max_ctas == 4
    assert given[1:] == [None, None]


def test_parameters_go_back_behind_the_copies_of_their_mean(ranks: Ranks) -> None:
    for calls in ranks.run(4, order_of_a_checkpoint):
        assert calls == ["put", "take", "hold", "put"]


def test_every_layout_of_a_copy_makes_the_same_steps(ranks: Ranks) -> None:
    outer = OuterTable(method="co2", tau=2, clip=0.01)
    layouts = ({"dp_shard": 2}, {"sp": 2}, {"tp": 2})
    found = [
        ranks.run(4, train_copies, SMALL, ParallelConfig(dp_replicate=2, outer=outer, **axes), 7)
        for axes in layouts
    ]
    exact, gaps = found[0][0]
    assert gaps[2] > 1.0
    for results in found:
        assert all(rank[1] == pytest.approx(gaps, rel=LAYOUT_FLOAT64) for rank in results)
        for name, x in exact.items():
            assert_close(results[0][0][name], x, limit=LAYOUT_FLOAT64, name=name)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("method=diloco", "tau=auto"), "tau is 'auto' for method 'diloco'"),
        (("method=co2", "tau=0"), "tau is 0; expected at least 1"),
        (("method=slowmo", "tau=4", "penalty=gap"), "its averages are not late"),
        (("method=co2", "tau=4", "penalty_value=2.0"), "penalty_value is 2.0 beside"),
        (("method=co2_eager", "tau=4", "clip=0.1"), "lets the copies drift apart"),
        (("method=co2_eager", "tau=4", "penalty=gap"), "lets the copies drift apart"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    tmp_path: Path, overrides: tuple[str, ...], reason: str
) -> None:
    table = [f"parallel.outer.{override}" for override in overrides]
    with pytest.raises(ValueError, match=reason):
        folder(tmp_path, "many", "parallel.dp_replicate=2", *table)


def test_one_copy_has_nobody_to_meet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dp_replicate is 1 beside"):
        folder(tmp_path, "many", *CO2)


def test_snapshots_do_not_hold_copies(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="guard.action is 'rollback' beside"):
        folder(tmp_path, "many", *CO2, "parallel.dp_replicate=2", "guard.action=rollback")


def test_a_table_replaces_what_its_method_has() -> None:
    table = OuterTable(method="co2", tau=4, clip=0, penalty="const", penalty_value=2.0, lr=0.5)
    config = table.config(4)
    assert (config.clip, config.penalty, config.penalty_value) == (None, "const", 2.0)
    assert (config.lr, config.momentum, config.delayed) == (0.5, 0.2, True)
