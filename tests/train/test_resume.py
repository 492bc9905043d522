"""Stopping and continuing: bit for bit, from whole checkpoints only, and never by accident."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from train_cases import (
    Crash,
    CrashAt,
    Notes,
    assert_same_checkpoint,
    constant_evaluation,
    files_limited_to,
)

from transnormer.models import checkpoint
from transnormer.optim.split_weights import joined
from transnormer.train import OneProcess, RunConfig, StepReport, run_training
from transnormer.train.checkpoints import find_checkpoint, list_checkpoints, what_is_wrong
from transnormer.train.metrics import read_records

MakeConfig = Callable[..., RunConfig]


class Interrupt(Notes):
    """A Progress that sends this process a signal at a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.at, self.number = step, number

    def step(self, report: StepReport, steps: int) -> None:
        super().step(report, steps)
        if report.step == self.at:
            os.kill(os.getpid(), self.number)


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = read_records(run / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, optimizer: str, packing: str
) -> None:
    overrides = (f"optimizer.name={optimizer}", f"data.packing={packing}", "train.save_every=2")
    whole = run_training(
        make_config(*overrides, f"output.dir={tmp_path / 'whole'}"), evaluate=constant_evaluation
    )
    config = make_config(*overrides)
    with pytest.raises(Crash):
        run_training(config, evaluate=constant_evaluation, progress=CrashAt(5))
    # Another stream of random numbers in this process must not matter.
    torch.rand(100)
    resumed = run_training(
        config, resume=True, evaluate=constant_evaluation, progress=(notes := Notes())
    )
    assert notes.steps[0].step == 5
    assert_same_checkpoint(whole.checkpoint, resumed.checkpoint)
    assert losses(whole.run_dir) == losses(resumed.run_dir)
    assert resumed.first is not None
    assert resumed.first.step == 0


def test_metrics_are_cut_back_to_the_resumed_step(make_config: MakeConfig) -> None:
    config = make_config("train.save_every=2")
    with pytest.raises(Crash):
        run_training(config, progress=CrashAt(3))
    metrics = Path(config.output.dir) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "los')
    run_training(config, resume=True, progress=(notes := Notes()))
    assert [row["step"] for row in read_records(metrics)] == [1, 2, 3, 4, 5, 6]
    assert any("continuing from" in text for text in notes.messages)
    seconds = [row["seconds"] for row in read_records(metrics)]
    assert seconds == sorted(seconds)


def test_a_run_can_be_made_longer(make_config: MakeConfig, tmp_path: Path) -> None:
    constant = "optimizer.schedule=constant"
    run_training(make_config(constant, "train.steps=3"))
    longer = run_training(make_config(constant), resume=True)
    whole = run_training(make_config(constant, f"output.dir={tmp_path / 'whole'}"))
    assert_same_checkpoint(whole.checkpoint, longer.checkpoint)


def test_resuming_a_finished_run_does_nothing(make_config: MakeConfig) -> None:
    first = run_training(make_config())
    again = run_training(make_config(), resume=True, progress=(notes := Notes()))
    assert not notes.steps
    assert again.checkpoint == first.checkpoint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    make_config: MakeConfig, tmp_path: Path, number: int
) -> None:
    before = signal.getsignal(number)
    config = make_config()
    result = run_training(config, progress=Interrupt(3, number))
    assert (result.step, result.stopped_by) == (3, signal.Signals(number).name)
    assert what_is_wrong(result.checkpoint) is None
    assert signal.getsignal(number) is before
    resumed = run_training(config, resume=True)
    whole = run_training(make_config(f"output.dir={tmp_path / 'whole'}"))
    assert_same_checkpoint(whole.checkpoint, resumed.checkpoint)


def test_the_handlers_of_signals_come_back_after_a_run(make_config: MakeConfig) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_training(make_config("train.steps=1"))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_ends_at_once(make_config: MakeConfig) -> None:
    class Twice(Interrupt):
        def step(self, report: StepReport, steps: int) -> None:
            super().step(report, steps)
            super().step(report, steps)

    with pytest.raises(KeyboardInterrupt):
        run_training(make_config(), progress=Twice(3))


def test_an_existing_run_is_refused_without_resume(make_config: MakeConfig) -> None:
    result = run_training(make_config("train.steps=1"))
    before = (result.run_dir / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="output.dir is .*holds a run; .*--resume"):
        run_training(make_config("train.steps=1"))
    assert (result.run_dir / "metrics.jsonl").read_text() == before


def test_a_folder_of_something_else_is_refused(make_config: MakeConfig) -> None:
    folder = Path(make_config().output.dir)
    folder.mkdir()
    (folder / "thesis.txt").write_text("")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"output.dir is .*holds thesis.txt and no run"):
            run_training(make_config(), resume=resume)
    (folder / "thesis.txt").rename(folder.with_name("other.txt"))
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(ValueError, match="output.dir is .*, a file"):
        run_training(make_config())


def test_resume_without_a_checkpoint_starts_at_0_and_says_so(make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(Crash):
        run_training(config, progress=CrashAt(2))
    run_training(config, resume=True, progress=(notes := Notes()))
    assert any("no checkpoint" in text and "step 0" in text for text in notes.messages)
    assert notes.steps[0].step == 1


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=1",
        "train.tokens_per_step=128",
        "train.micro_batch=2",
        "data.seq=32",
        "data.packing=documents",
        "data.tokenizer=bpe:300",
        "model.glu_dim=64",
        "optimizer.lr=0.5",
    ],
)
def test_a_change_that_alters_the_result_is_refused(make_config: MakeConfig, override: str) -> None:
    run_training(make_config("train.steps=1"))
    key = override.split("=")[0]
    with pytest.raises(ValueError, match=f"{key} is .*; expected .*, as the run in .* has"):
        run_training(make_config("train.steps=2", override), resume=True)


def test_the_corpus_of_a_run_is_its_own(make_config: MakeConfig) -> None:
    config = make_config("train.save_every=2", "train.steps=4")
    with pytest.raises(Crash):
        run_training(config, progress=CrashAt(3))
    Path(config.data.paths[0]).unlink()
    assert run_training(config, resume=True).step == 4


def test_a_tampered_shard_is_refused(make_config: MakeConfig) -> None:
    result = run_training(make_config("train.steps=1"))
    shard = next(result.run_dir.glob("data/*/train/*.bin"))
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=f"{shard.name} has changed"):
        run_training(make_config("train.steps=2"), resume=True)


def damage(path: Path, kind: str) -> None:
    weights = path / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif kind == "missing":
        (path / "optimizer.safetensors").unlink()
    elif kind == "unmarked":
        (path / "COMPLETE").unlink()
    else:
        (path / "COMPLETE").write_text(kind)


MARKERS = [
    "",
    "[1]",
    '{"files": {}}',
    '{"files": 3}',
    '{"format": "transnormer-checkpoint-1", "files": {"model.safetensors": 5}}',
    '{"format": "transnormer-checkpoint-1", "files": {"model.safetensors": {"bytes": 5}}}',
    '{"format": "transnormer-checkpoint-2", "files": {"trainer.json": {"bytes": 5, "sha256": ""}}}',
]


@pytest.mark.parametrize("marker", MARKERS)
def test_a_damaged_marker_is_named(make_config: MakeConfig, marker: str) -> None:
    path = run_training(make_config("train.steps=1")).checkpoint
    damage(path, marker)
    reason = what_is_wrong(path)
    assert reason is not None
    assert reason.startswith(f"{path / 'COMPLETE'} is damaged: ")
    assert "\n" not in reason


@pytest.mark.parametrize("kind", ["truncated", "changed", "missing", "unmarked", *MARKERS])
def test_damaged_checkpoints_are_never_loaded(make_config: MakeConfig, kind: str) -> None:
    config = make_config("train.save_every=2", "train.steps=4", "train.keep_last=0")
    run = run_training(config).run_dir
    damage(run / "checkpoints" / "step_00000004", kind)
    assert find_checkpoint(run).path == run / "checkpoints" / "step_00000002"
    run_training(config, resume=True, progress=(notes := Notes()))
    assert [report.step for report in notes.steps] == [3, 4]
    assert any("damaged checkpoint" in text for text in notes.messages)
    assert (run / "checkpoints" / "damaged-step_00000004").is_dir()
    assert what_is_wrong(run / "checkpoints" / "step_00000004") is None


def test_a_run_with_damaged_checkpoints_alone_is_not_started_over(make_config: MakeConfig) -> None:
    config = make_config("train.steps=1")
    result = run_training(config)
    damage(result.checkpoint, "changed")
    with pytest.raises(ValueError, match="has no whole checkpoint: .*SHA-256"):
        run_training(config, resume=True)
    assert result.checkpoint.is_dir()


@pytest.mark.parametrize(("keep", "steps"), [(1, [6]), (3, [6, 4, 2]), (0, [6, 4, 2])])
def test_the_newest_checkpoints_are_kept(
    make_config: MakeConfig, keep: int, steps: list[int]
) -> None:
    run = run_training(make_config("train.save_every=2", f"train.keep_last={keep}")).run_dir
    assert [int(path.name[-8:]) for path in list_checkpoints(run)] == steps


def test_leftovers_of_a_killed_process_are_removed(make_config: MakeConfig) -> None:
    config = make_config("train.save_every=2", "train.steps=2")
    run = run_training(config).run_dir
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step_00000002", checkpoints / ".partial-step_00000004")
    run_training(make_config("train.save_every=2", "train.steps=4"), resume=True)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step_00000002",
        "step_00000004",
    ]


def test_a_full_disk_is_one_line_and_keeps_the_previous_checkpoint(make_config: MakeConfig) -> None:
    config = make_config("train.save_every=2", "train.steps=4")
    with pytest.raises(Crash):
        run_training(config, progress=CrashAt(3))
    run = Path(config.output.dir)
    pattern = r"checkpoint of step 4 cannot be written: .*step_00000002; free space"
    with files_limited_to(20_000), pytest.raises(RuntimeError, match=pattern) as caught:
        run_training(config, resume=True)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert what_is_wrong(run / "checkpoints" / "step_00000002") is None
    assert run_training(config, resume=True).step == 4


# TensorBoard's own thread dies on the full disk; it says so beside the run's one line.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_metrics_that_fill_the_disk_are_one_line_too(make_config: MakeConfig) -> None:
    with pytest.raises(Crash):
        run_training(make_config("train.steps=400", "train.save_every=2"), progress=CrashAt(3))
    config = make_config("train.steps=400")
    size = (Path(config.output.dir) / "checkpoints/step_00000002/optimizer.safetensors").stat()
    with (Path(config.output.dir) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 0, "pad": "x" * size.st_size}) + "\n")
    pattern = r"run cannot be written: .*checkpoint is .*step_00000002; free space"
    with files_limited_to(size.st_size + 2000), pytest.raises(RuntimeError, match=pattern):
        run_training(config, resume=True)


def test_two_processes_cannot_train_in_one_directory(make_config: MakeConfig) -> None:
    config = make_config()

    class Nested(Notes):
        def step(self, report: StepReport, steps: int) -> None:
            with pytest.raises(RuntimeError, match="where another process is training"):
                run_training(config, resume=True)
            super().step(report, steps)

    run_training(config, progress=(nested := Nested()))
    assert len(nested.steps) == 6


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_a_run_with_bfloat16_weights_resumes_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, states: str
) -> None:
    half = ("train.weights=bfloat16", f"optimizer.states={states}", "train.precision=bfloat16")
    whole = run_training(make_config(*half, f"output.dir={tmp_path / 'whole'}")).run_dir
    config = make_config(*half, f"output.dir={tmp_path / 'parts'}")
    stopped = config.train.model_copy(update={"max_minutes": 1e-9})
    assert run_training(config.model_copy(update={"train": stopped})).step == 1
    parts = run_training(config, resume=True).run_dir
    a, b = (checkpoint.load(run).state_dict() for run in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["embedding.weight"].dtype == torch.bfloat16
    assert a["blocks.0.token_mixer.lrpe.theta"].dtype == torch.float32


def test_the_rest_of_bfloat16_weights_is_there_before_the_first_step(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    half = ("train.weights=bfloat16", "train.precision=bfloat16")
    source = run_training(make_config(f"output.dir={tmp_path / 'source'}", "train.steps=1")).run_dir
    exact = checkpoint.load(source).state_dict()
    config = make_config(
        *half, f"output.dir={tmp_path / 'run'}", "train.save_every=1", "guard.action=skip"
    )
    model = type(config.model).model_validate({"init_from": str(source)})
    config = config.model_copy(update={"model": model})
    seen = []

    class Spikes(OneProcess):
        """The first norm is none, so that nothing is updated."""

        def wrap(self, model: Any, values: None = None) -> Any:
            seen.append(model)
            return model

        def total_norm(self, model: Any) -> Tensor:
            return super().total_norm(model) * float("nan")

    stopped = config.train.model_copy(update={"max_minutes": 1e-9})
    first = run_training(config.model_copy(update={"train": stopped}), sync=Spikes())
    assert first.step == 1
    states = load_file(first.checkpoint / "optimizer.safetensors")
    weights = checkpoint.load(first.run_dir).state_dict()
    for name, x in weights.items():
        if x.dtype == torch.bfloat16:
            assert torch.equal(joined(x, states[f"{name}/remainder"]), exact[name]), name
    resumed = run_training(config.model_copy(update={"train": stopped}), resume=True, sync=Spikes())
    again = load_file(resumed.checkpoint / "optimizer.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in states.items())
    assert all("remainder" not in p.__dict__ for model in seen for p in model.parameters())


def test_bfloat16_weights_are_refused_where_updates_would_be_lost(make_config: MakeConfig) -> None:
    weights = "train.weights=bfloat16"
    with pytest.raises(ValueError, match="train.precision is 'float32' beside train.weights"):
        make_config(weights)
    half = (weights, "train.precision=bfloat16")
    with pytest.raises(ValueError, match="optimizer.name is 'muon' beside train.weights = 'bfl"):
        make_config(*half, "optimizer.name=muon")
    outer = (*half, "parallel.dp_replicate=2", "parallel.outer.method=co2", "parallel.outer.tau=2")
    with pytest.raises(ValueError, match="optimizer.states is 'float32' beside train.weights"):
        make_config(*outer)
