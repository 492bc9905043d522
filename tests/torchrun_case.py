"""What torchrun starts in a test: a run one of whose ranks is killed once, in the middle."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from train_cases import Notes, constant_evaluation

from transnormer.train import RunConfig, StepReport, run_training
from transnormer.train.processes import join_processes

KILLED_AT = 3


def main(recipe: Path, run_dir: Path) -> None:
    """Train as the recipe says in another directory; go on where a run is."""
    torch.set_num_threads(1)
    data = json.loads(recipe.read_text())
    data["output"]["dir"] = str(run_dir)
    config = RunConfig.model_validate(data)
    sync, _ = join_processes(config, torch.device("cpu"))

    class Killer(Notes):
        def step(self, report: StepReport, steps: int) -> None:
            if report.step == KILLED_AT and not (run_dir / "killed").exists():
                (run_dir / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    resume = (run_dir / "config.json").exists()
    run_training(config, resume=resume, evaluate=constant_evaluation, progress=Killer(), sync=sync)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
