"""How a run ended."""

from pathlib import Path
from typing import Literal, NamedTuple

from transnormer.train.metrics import HeldoutReport
from transnormer.train.signals import SignalName

StoppedBy = Literal["steps", "max_minutes"] | SignalName


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
        run_dir: the run directory.
        step: updates done in all.
        stopped_by: "steps" where all were done.
        checkpoint: the last one.
        first, last: the first and the newest evaluation of the run, None without evaluations.
        seconds: the run's own time over all resumptions.
    """

    run_dir: Path
    step: int
    stopped_by: StoppedBy
    checkpoint: Path
    first: HeldoutReport | None
    last: HeldoutReport | None
    seconds: float
