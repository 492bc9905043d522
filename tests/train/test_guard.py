"""The loss-spike guard: planted spikes are found, answered, recorded, and answered again alike."""

import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import Notes, constant_evaluation

from transnormer.data import Batch
from transnormer.models import checkpoint
from transnormer.optim import OptimizerConfig, build_optimizer
from transnormer.train import OneProcess, RunConfig, TrainingDiverged, checkpoints, run_training
from transnormer.train.guard import Guard, GuardConfig, robust_score
from transnormer.train.metrics import read_records
from transnormer.train.objectives.windows import WindowObjective

MakeConfig = Callable[..., RunConfig]
GUARD = ("guard.window=8", "guard.threshold=12", "guard.snapshot_every=4", "train.steps=24")
Plant = Callable[..., None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Let the batches of some numbers ask for bytes that never occur."""

    def plant(*numbers: int) -> None:
        def batch(self: WindowObjective, index: int) -> Batch:
            found = self.loader.batch(index)
            if index in numbers:
                found = found._replace(labels=torch.full_like(found.labels, 7))
            return found

        monkeypatch.setattr(WindowObjective, "batch", batch)

    return plant


def rows(run: Path) -> list[dict]:
    found = read_records(run / "metrics.jsonl")
    for row in found:
        for name in ("seconds", "tokens_per_second"):
            row.pop(name, None)
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run).state_dict()


def assert_same_run(first: Path, second: Path) -> None:
    assert rows(first) == rows(second)
    a, b = weights(first), weights(second)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_score_is_in_robust_deviations_above_the_median() -> None:
    past = deque([1.0, 2.0, 3.0, 4.0, 100.0])
    assert robust_score(3.0 + 1.4826 * 5, past) == pytest.approx(5.0)
    assert robust_score(0.0, past) < 0
    # A level that stands still: a thousandth of it counts as the deviation.
    assert robust_score(2.02, deque([2.0] * 5)) == pytest.approx(10.0)


def test_without_spikes_a_guard_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    runs = []
    for action in ("off", "skip", "rollback"):
        config = make_config(*GUARD, f"guard.action={action}", f"output.dir={tmp_path / action}")
        runs.append(run_training(config).run_dir)
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])


def test_off_takes_every_step(make_config: MakeConfig, plant: Plant) -> None:
    plant(12)
    run = run_training(make_config(*GUARD)).run_dir
    assert len(rows(run)) == 24
    assert not any("action" in row for row in rows(run))


def test_a_spike_is_skipped_and_recorded(make_config: MakeConfig, plant: Plant) -> None:
    plant(12)

    class Watch(OneProcess):
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.weights: list[torch.Tensor] = []

        def after_backward(self, model: torch.nn.Module) -> None:
            self.weights.append(model.embedding.weight.detach().clone())

        def after_step(self, model: torch.nn.Module, step: int) -> None:
            self.steps.append(step)

    config = make_config(*GUARD, "guard.action=skip")
    notes, watch = Notes(), Watch()
    run = run_training(config, progress=notes, sync=watch).run_dir
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, 25))
    skipped = [row for row in found if "action" in row]
    assert [(row["step"], row["action"]) for row in skipped] == [(13, "skip")]
    assert "robust deviations above its median" in skipped[0]["reason"]
    assert skipped[0]["loss"] > 1.5 * found[11]["loss"]
    assert watch.steps == [step for step in range(1, 25) if step != 13]
    moved = [not torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:])]
    assert moved == [step != 13 for step in range(1, 24)]
    assert any(
        message.startswith("step 13: ") and message.endswith("skipped")
        for message in notes.messages
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_a_spike(make_config: MakeConfig, value: float) -> None:
    class Poison(OneProcess):
        calls = 0

        def after_backward(self, model: torch.nn.Module) -> None:
            self.calls += 1
            if self.calls == 2:
                model.embedding.weight.grad[0, 0] = value

    run = run_training(make_config("guard.action=skip"), sync=Poison()).run_dir
    row = rows(run)[1]
    assert row["reason"] == f"grad_norm is {value}"
    assert "grad_norm" not in row
    assert (run / "loss.png").exists()


def test_a_rollback_goes_on_from_the_snapshot_with_later_data(
    make_config: MakeConfig, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(13)
    read: list[int] = []
    planted = WindowObjective.batch
    monkeypatch.setattr(
        WindowObjective, "batch", lambda self, i: (read.append(i), planted(self, i))[1]
    )
    config = make_config(*GUARD, "guard.action=rollback", "train.eval_every=2")
    run = run_training(config, evaluate=constant_evaluation).run_dir
    found = rows(run)
    back = next(row for row in found if "action" in row)
    assert (back["step"], back["action"], back["from_step"]) == (12, "rollback", 14)
    assert back["next_sample"] == 4 * 14
    assert [row["step"] for row in found if "loss" in row] == list(range(1, 25))
    # Steps 13 and 14 again, with the batches behind the spike; 24 steps in all.
    assert read == list(range(26))
    evaluations = read_records(run / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == list(range(0, 25, 2))


def test_a_rollback_restores_every_bit(
    make_config: MakeConfig, plant: Plant, tmp_path: Path
) -> None:
    plant(13)
    config = make_config(*GUARD, "guard.action=rollback", f"output.dir={tmp_path / 'back'}")
    back = run_training(config).run_dir

    # A run that leaves the same batches out, and rolls nothing back.
    original = WindowObjective.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            WindowObjective, "batch", lambda self, i: original(self, i if i < 12 else i + 2)
        )
        config = make_config("train.steps=24", f"output.dir={tmp_path / 'jump'}")
        jumped = run_training(config).run_dir
    a, b = weights(back), weights(jumped)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("stop", [pytest.param(13, marks=pytest.mark.slow), 15])
def test_an_interrupted_run_answers_alike(
    make_config: MakeConfig, plant: Plant, tmp_path: Path, action: str, stop: int
) -> None:
    plant(13, 15)
    # A run that ends early has the same rates only where they are constant.
    options = (
        *GUARD,
        f"guard.action={action}",
        "train.save_every=3",
        "optimizer.schedule=constant",
    )
    whole = run_training(make_config(*options, f"output.dir={tmp_path / 'whole'}")).run_dir

    class Stop(KeyboardInterrupt):
        pass

    class Watch(OneProcess):
        calls = 0

        def after_backward(self, model: torch.nn.Module) -> None:
            self.calls += 1
            if self.calls == stop:
                raise Stop

    config = make_config(*options, f"output.dir={tmp_path / 'parts'}")
    with pytest.raises(Stop):
        run_training(config, sync=Watch())
    # Once more, ended in order between snapshot and spike: this checkpoint is no snapshot.
    short = config.train.model_copy(update={"steps": 13})
    assert run_training(config.model_copy(update={"train": short}), resume=True).step == 13
    parts = run_training(config, resume=True).run_dir
    assert_same_run(whole, parts)
    assert any("action" in row for row in rows(parts))


def test_a_checkpoint_of_steps_given_up_is_removed(make_config: MakeConfig, plant: Plant) -> None:
    plant(13)
    config = make_config(*GUARD, "guard.action=rollback", "train.keep_last=0")

    class Stop(OneProcess):
        """Ends a run within a pass."""

        def __init__(self, call: int) -> None:
            self.left = call

        def after_backward(self, model: torch.nn.Module) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    def names() -> list[str]:
        folder = Path(config.output.dir) / "checkpoints"
        return [path.name for path in folder.iterdir()]

    stopped = config.train.model_copy(update={"steps": 13})
    run_training(config.model_copy(update={"train": stopped}))
    assert names() == ["step_00000013"]
    with pytest.raises(KeyboardInterrupt):
        run_training(config, resume=True, sync=Stop(2))
    assert names() == ["step_00000012"]
    stored = Path(config.output.dir) / "checkpoints" / "step_00000012" / "trainer.json"
    assert json.loads(stored.read_text())["next_sample"] == 4 * 14


def test_the_wait_of_a_rollback_is_no_reason_to_save_less(
    make_config: MakeConfig, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(13)
    write, notes = checkpoints.write_checkpoint, Notes()

    def slow(*args: Any, **options: Any) -> Path:
        # Steps take less, and the spike follows the checkpoint at once.
        time.sleep(0.5)
        return write(*args, **options)

    monkeypatch.setattr(checkpoints, "write_checkpoint", slow)
    config = make_config(*GUARD, "guard.action=rollback", "train.save_every=12", "train.steps=14")
    run_training(config, progress=notes)
    assert any("back to step 12" in text for text in notes.messages)
    assert not any("raise train.save_every" in text for text in notes.messages)


def test_a_rollback_whose_checkpoint_cannot_be_written_loses_none(
    make_config: MakeConfig, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(14)
    config = make_config(*GUARD, "guard.action=rollback", "train.keep_last=1")
    stopped = config.train.model_copy(update={"steps": 13})
    run = run_training(config.model_copy(update={"train": stopped})).run_dir

    def full(*args: object, **options: object) -> None:
        raise RuntimeError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_checkpoint", full)
        with pytest.raises(RuntimeError, match="disk is full"):
            run_training(config, resume=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000013"]
    assert run_training(config, resume=True).step == 24
    assert rows(run)[-13]["action"] == "rollback"


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_spikes_without_end_stop_the_run(
    make_config: MakeConfig, plant: Plant, action: str
) -> None:
    plant(*range(13, 99))
    config = make_config(*GUARD, f"guard.action={action}", "guard.most=2")
    with pytest.raises(TrainingDiverged, match="after 2 actions of the guard in a row; expected"):
        run_training(config)


def test_a_value_that_is_never_finite_is_named(make_config: MakeConfig) -> None:
    class Poison(OneProcess):
        def after_backward(self, model: torch.nn.Module) -> None:
            model.embedding.weight.grad[0, 0] = math.nan

    config = make_config("guard.action=skip", "guard.most=2")
    with pytest.raises(TrainingDiverged, match="grad_norm is nan at step 3"):
        run_training(config, sync=Poison())


def test_a_rollback_restores_the_window(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerConfig())
    guard = Guard(GuardConfig(action="rollback"), tmp_path)
    for step in range(1, 4):
        guard.judge(float(step), 1.0, step)
    guard.take(3, 0, model, optimizer)
    guard.judge(4.0, 1.0, 4)
    guard.roll_back(model, optimizer)
    assert guard.state_tensors(3)["now/losses"].tolist() == [1.0, 2.0, 3.0]
