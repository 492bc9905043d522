"""Runs on several processes: the run directory of one, whatever the layout, and its exact resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_cases import run_in_layout
from ranks import Ranks
from safetensors.torch import load_file
from tolerances import RELAID_LOSS, RESIDUAL_LOSS
from train_cases import constant_evaluation, tiny_run

from transnormer.models import checkpoint
from transnormer.parallel.mesh import Axes
from transnormer.train import RunConfig, run_training

PLAIN = ("model.dropout=0.0", "optimizer.schedule=constant", "train.eval_every=2")


def losses(run_dir: Path) -> list[float]:
    """The losses of a run, step by step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def folder(tmp_path: Path, name: str, *overrides: str) -> RunConfig:
    return tiny_run(tmp_path, *PLAIN, f"output.dir={tmp_path / name}", *overrides)


def compare(found: list[float], exact: list[float], limit: float = RELAID_LOSS) -> None:
    assert len(found) == len(exact)
    for a, b in zip(found, exact, strict=True):
        assert abs(a - b) <= limit * abs(b)


HALF = ("train.weights=bfloat16", "train.precision=bfloat16")


@pytest.mark.parametrize(
    "settings",
    [(), pytest.param(("data.packing=documents",), marks=pytest.mark.slow), HALF],
    ids=["stream", "documents", "bfloat16"],
)
def test_a_run_that_is_laid_out_anew_goes_on_exactly(
    ranks: Ranks, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    alone = run_training(folder(tmp_path, "alone", *settings), evaluate=constant_evaluation)
    stages = ((Axes(dp_shard=2, sp=2), 2), (Axes(dp_replicate=2, tp=2), 4))
    for axes, steps in stages:
        config = folder(tmp_path, "many", *settings, f"train.steps={steps}")
        found = ranks.run(4, run_in_layout, config, axes, steps > 2)
        assert found == [(steps, True), *[(steps, False)] * 3]
    config = folder(tmp_path, "many", *settings)
    last = run_training(config, resume=True, evaluate=constant_evaluation)
    limit = RESIDUAL_LOSS if settings == HALF else RELAID_LOSS
    compare(losses(last.run_dir), losses(alone.run_dir), limit)
    if settings == HALF:
        ours, exact = (load_file(x.checkpoint / "optimizer.safetensors") for x in (last, alone))
        assert {(name, x.dtype) for name, x in ours.items()} == {
            (name, x.dtype) for name, x in exact.items()
        }
        assert all(x.any() for name, x in ours.items() if name.endswith("/remainder"))
    else:
        ours, exact = (checkpoint.load(result.run_dir).state_dict() for result in (last, alone))
        for name, expected in exact.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)
    files = {path.name for path in last.checkpoint.iterdir()}
    assert files == {path.name for path in alone.checkpoint.iterdir()}


def test_an_error_of_the_first_process_ends_all(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "other").touch()
    with pytest.raises(AssertionError) as caught:
        ranks.run(4, run_in_layout, folder(tmp_path, "many"), Axes(dp_shard=4), False)
    assert str(caught.value).count("ValueError: output.dir is") == 4


@pytest.mark.slow
def test_torchrun_trains_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    config = folder(tmp_path, "alone", "train.save_every=2")
    alone = run_training(config, evaluate=constant_evaluation)
    recipe = tmp_path / "run.json"
    recipe.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, str(Path(__file__).parents[1] / "torchrun_case.py"), str(recipe)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A rank kills itself at step 3; the launcher starts all again, which go on from step 2.
    subprocess.run(
        [*launcher, "--nproc-per-node", "2", "--max-restarts", "1", *command[1:],
         str(tmp_path / "many")],
        env=environment, check=True, timeout=110,
    )  # fmt: skip
    compare(losses(tmp_path / "many"), losses(alone.run_dir))
    assert (tmp_path / "many" / "killed").exists()
