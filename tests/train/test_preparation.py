"""Before the first step: what fails or is killed there leaves nothing in the user's way."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from train_cases import Notes, files_limited_to, tiny_run

from transnormer.train import run_training


# 500 bytes do not hold config.json, 2,000 hold it and not the shards.
@pytest.mark.parametrize("size", [500, 2000])
@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk_in_preparation_is_one_line_and_leaves_nothing(
    tmp_path: Path, size: int, resume: bool
) -> None:
    config = tiny_run(tmp_path)
    pattern = r"run cannot be written: .*expected room and permission"
    with files_limited_to(size), pytest.raises(RuntimeError, match=pattern) as caught:
        run_training(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.output.dir).exists()
    assert run_training(config, resume=resume).step == 6


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, f"output.dir={tmp_path / 'corpus.txt' / 'run'}")
    with pytest.raises(RuntimeError, match=r"corpus.txt/run cannot be written: .*Not a directory"):
        run_training(config)


def make_leftovers(run_dir: Path, config: dict[str, Any] | None) -> None:
    """What a kill leaves: files half written, and perhaps config.json of a run not begun."""
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / ".lock").touch()
    (run_dir / ".config.json.abc.tmp").touch()
    (run_dir / ".data.abc.tmp").mkdir()
    if config is not None:
        (run_dir / "config.json").write_text(json.dumps({**config, "resolved": {}}))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("begun", [False, True], ids=["before config.json", "after config.json"])
def test_leftovers_of_a_killed_preparation_do_not_lock_the_directory(
    tmp_path: Path, resume: bool, begun: bool
) -> None:
    config = tiny_run(tmp_path)
    run_dir = Path(config.output.dir)
    make_leftovers(run_dir, config.model_dump(mode="json") if begun else None)
    assert run_training(config, resume=resume).step == 6
    assert not list(run_dir.glob(".*.tmp"))


def test_a_run_not_begun_may_be_begun_with_another_configuration(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    make_leftovers(Path(config.output.dir), config.model_dump(mode="json"))
    run_training(tiny_run(tmp_path, "train.seed=7"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["seed"] == 7


def test_what_is_foreign_is_named_and_kept(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    make_leftovers(Path(config.output.dir), None)
    theirs = Path(config.output.dir) / "data"
    theirs.mkdir()
    for resume in (False, True):
        with pytest.raises(ValueError, match="which holds data and no run"):
            run_training(config, resume=resume)
    assert theirs.is_dir()


class SignalAt(Notes):
    """A Progress that sends this process a signal at its first message."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def message(self, text: str) -> None:
        super().message(text)
        if len(self.messages) == 1:
            os.kill(os.getpid(), self.number)


def refuse(number: int, frame: object) -> None:
    raise AssertionError("the signal was not taken by the run")


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_in_preparation_cleans_up_and_ends(
    tmp_path: Path, number: int, kind: type[BaseException]
) -> None:
    config = tiny_run(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, refuse)
    try:
        with pytest.raises(kind) as caught:
            run_training(config, progress=(notes := SignalAt(number)))
        assert signal.getsignal(signal.SIGTERM) is refuse
    finally:
        signal.signal(signal.SIGTERM, before)
    if kind is SystemExit:
        assert caught.value.code == 143
        assert notes.messages[-1] == "stopped by SIGTERM"
    assert not Path(config.output.dir).exists()
    assert run_training(config).step == 6
