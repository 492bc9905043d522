"""Checkpoints of one process, written beside the training."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from train_cases import Crash, CrashAt, Notes, assert_same_checkpoint, tiny_run

from transnormer.data.tokenizers import ByteTokenizer
from transnormer.optim import Optimizer
from transnormer.parallel import host_copies
from transnormer.parallel.host_copies import HostCopies
from transnormer.train import StepReport, checkpoints, run_training
from transnormer.train.checkpoints import (
    Contents,
    find_checkpoint,
    list_checkpoints,
    read_counters,
    step_path,
    what_is_wrong,
    write_checkpoint,
)
from transnormer.train.saving import Saver, wait_for_left_writing
from transnormer.train.sync import OneProcess


class Gate(Notes):
    """Opens when a step has been done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at, self.open = step, threading.Event()

    def step(self, report: StepReport, steps: int) -> None:
        super().step(report, steps)
        if report.step >= self.at:
            self.open.set()


def test_a_checkpoint_is_of_its_own_step_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("train.save_every=2", "train.keep_last=0")
    waiting = tiny_run(tmp_path, *every, "train.save_async=false", f"output.dir={tmp_path / 'a'}")
    run_training(waiting)
    gate, write = Gate(4), checkpoints.write_checkpoint

    def late(*args: Any, **options: Any) -> Path:
        assert gate.open.wait(60)
        return write(*args, **options)

    monkeypatch.setattr(checkpoints, "write_checkpoint", late)
    result = run_training(tiny_run(tmp_path, *every), progress=gate)
    assert [what_is_wrong(path) for path in list_checkpoints(result.run_dir)] == [None] * 3
    for step in (2, 4, 6):
        assert_same_checkpoint(step_path(tmp_path / "a", step), step_path(result.run_dir, step))


def test_a_step_that_is_written_again_is_there_while_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, "train.steps=2", "train.eval_every=0")
    run = run_training(config).run_dir
    found, remove = [], shutil.rmtree

    def look(path: Path, *args: Any, **options: Any) -> None:
        found.append(find_checkpoint(run).path)
        remove(path, *args, **options)

    class Again(NamedTuple):
        """The weights of the first time."""

        source: Path

        def write(self, folder: Path, *, tokenizer_fingerprint: str | None) -> None:
            shutil.copy(self.source / "model.safetensors", folder)

        def from_first(self, make: Callable[[], Any]) -> Any:
            return make()

    path = step_path(run, 2)
    shutil.copytree(path, tmp_path / "first")
    contents = Contents(read_counters(path), ByteTokenizer(), {}, None, None)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", look)
    write_checkpoint(run, Again(tmp_path / "first"), contents, keep_last=0)
    assert found == [path]


def test_an_error_beside_the_training_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write_checkpoint

    def full(run_dir: Path, staged: Any, contents: Any, **options: Any) -> Path:
        if contents.counters.step == 4:
            raise RuntimeError("the disk is full")
        return write(run_dir, staged, contents, **options)

    monkeypatch.setattr(checkpoints, "write_checkpoint", full)
    notes = Notes()
    with pytest.raises(RuntimeError, match="the disk is full"):
        run_training(tiny_run(tmp_path, "train.save_every=2"), progress=notes)
    # At the end of the step after it, or where the next checkpoint waits for it.
    assert 5 <= len(notes.steps) <= 6
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000002"]


def test_another_error_does_not_cut_a_checkpoint_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash, write = CrashAt(3), checkpoints.write_checkpoint

    def late(*args: Any, **options: Any) -> Path:
        threading.Event().wait(0.5)
        return write(*args, **options)

    monkeypatch.setattr(checkpoints, "write_checkpoint", late)
    with pytest.raises(Crash):
        run_training(tiny_run(tmp_path, "train.save_every=2"), progress=crash)
    assert what_is_wrong(step_path(tmp_path / "run", 2)) is None


def test_a_second_signal_leaves_the_wait_for_a_checkpoint_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, write = threading.Event(), checkpoints.write_checkpoint

    def stuck(*args: Any, **options: Any) -> Path:
        assert release.wait(60)
        return write(*args, **options)

    class Interrupt(Notes):
        def step(self, report: StepReport, steps: int) -> None:
            if report.step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_checkpoint", stuck)
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny_run(tmp_path, "train.save_every=2"), progress=Interrupt())
    assert list_checkpoints(tmp_path / "run") == []

    class Waits(Notes):
        def message(self, text: str) -> None:
            super().message(text)
            if text.startswith("waiting for the checkpoint"):
                release.set()

    # The process goes on all the same, and to the same directory, while the checkpoint is written.
    notes, config = Waits(), tiny_run(tmp_path, "train.save_every=2", "train.steps=3")
    run_training(config, resume=True, progress=notes)
    assert any(text.endswith("step_00000002") for text in notes.messages)


def test_an_interrupted_wait_leaves_the_wait_to_the_next_run(tmp_path: Path) -> None:
    release, told, written = threading.Event(), [], []

    def write() -> None:
        assert release.wait(60)
        written.append(True)

    def tell(text: str) -> None:
        told.append(text)
        release.set()

    saver = Saver(OneProcess(), told.append, tmp_path)
    saver.start(write)
    for wait in (saver.drain, lambda: wait_for_left_writing(tmp_path, lambda text: None)):
        interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
    wait_for_left_writing(tmp_path / "another", tell)
    assert not told
    wait_for_left_writing(tmp_path, tell)
    assert written
    assert told == [f"waiting for the checkpoint that an earlier run still writes to {tmp_path}"]


def test_the_memory_of_checkpoints_is_there_after_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, packed, asked = Notes(), host_copies.packed, []

    def look(sizes: Any, most: int) -> Any:
        asked.append((len(notes.steps), len(sizes)))
        return packed(sizes, most)

    monkeypatch.setattr(host_copies, "packed", look)
    run_training(tiny_run(tmp_path, "train.save_every=2"), progress=notes)
    assert {step for step, names in asked if names} == {1}
    assert max(step for step, _ in asked) > 2


def test_nothing_changes_before_a_checkpoint_has_taken_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(kind: type, name: str) -> None:
        whole = getattr(kind, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return whole(*args, **options)

        monkeypatch.setattr(kind, name, call)

    prepare = Optimizer.prepare

    def prepared(self: Optimizer, factor: Any) -> Any:
        make = prepare(self, factor)
        return lambda: (calls.append("step"), make())

    noted(HostCopies, "take")
    noted(HostCopies, "hold")
    monkeypatch.setattr(Optimizer, "prepare", prepared)
    run_training(tiny_run(tmp_path, "train.save_every=1", "train.steps=3"))
    assert calls == ["hold", "step", "take", "take"] + ["hold", "step", "take"] * 2


def test_a_run_that_saves_too_often_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))
    fast = type("", (), {"perf_counter": staticmethod(lambda: next(ticks) * 1e-3)})
    monkeypatch.setattr("transnormer.train.saving.time", fast)
    drain, slow = Saver.drain, [False]

    def drained(self: Saver) -> None:
        drain(self)
        if slow[0]:
            for _ in range(5000):
                next(ticks)

    monkeypatch.setattr(Saver, "drain", drained)
    for slow[0], every, told in ((False, 2, 0), (True, 2, 1), (True, 0, 0)):
        notes = Notes()
        own = (f"train.save_every={every}", f"output.dir={tmp_path / f'{slow[0]}{every}'}")
        run_training(tiny_run(tmp_path, *own), progress=notes)
        found = [text for text in notes.messages if "raise train.save_every" in text]
        assert len(found) == told
        assert all("step 2: training waited 5 s for the checkpoint" in text for text in found)
