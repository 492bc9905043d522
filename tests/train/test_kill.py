"""A real process that trains is killed, again and again, at any moment."""

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_cases import tiny_run, train_once

from transnormer.models import checkpoint
from transnormer.train import RunConfig, run_training
from transnormer.train.checkpoints import COMPLETE, list_checkpoints, what_is_wrong

KILLS = 50


def start(config: RunConfig) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    # The server has torch imported already: a start then costs milliseconds, not seconds.
    context.set_forkserver_preload(
        ["transnormer.train", "torch._dynamo", "torch.utils.tensorboard"]
    )
    process = context.Process(target=train_once, args=(config,))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    process.close()


def check_all_complete_checkpoints_load(run: Path) -> int:
    """Load every checkpoint that says it is complete; return the newest step."""
    steps = [0]
    for path in list_checkpoints(run):
        # The rename comes after the marker: no folder of this name lacks it.
        assert (path / COMPLETE).is_file(), path
        assert what_is_wrong(path) is None
        checkpoint.load(path)
        steps.append(json.loads((path / "trainer.json").read_text())["step"])
    return max(steps)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(1)
    # A constant rate: the number of steps, which is known at the end, then changes no update.
    common = ("optimizer.schedule=constant", "train.save_every=2", "train.keep_last=3")
    endless = tiny_run(tmp_path, *common, "train.steps=1000000")
    newest = [0]
    for _ in range(KILLS):
        process = start(endless)
        time.sleep(rng.uniform(0.05, 0.8))
        assert process.is_alive(), f"the run ended before it was killed: {process.exitcode}"
        kill(process)
        newest.append(check_all_complete_checkpoints_load(Path(endless.output.dir)))
        # At most the steps since the last checkpoint are lost, never a checkpoint.
        assert newest[-1] >= newest[-2]
    assert len(set(newest)) > 10
    steps = f"train.steps={newest[-1] + 3}"
    killed = run_training(tiny_run(tmp_path, *common, steps), resume=True)
    apart = (steps, f"output.dir={tmp_path / 'whole'}", "train.save_every=0")
    whole = run_training(tiny_run(tmp_path, *common, *apart))
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        a, b = load_file(killed.checkpoint / name), load_file(whole.checkpoint / name)
        assert all(torch.equal(a[key], b[key]) for key in a | b), name
    rows = [
        [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        for result in (killed, whole)
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, newest[-1] + 4))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
