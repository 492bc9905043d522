"""What a run measures: JSON lines, TensorBoard, a picture of the loss."""

import io
import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from transnormer.files import write_atomic
from transnormer.parallel.outer_config import OuterReport

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
TENSORBOARD, PICTURE = "tensorboard", "loss.png"


class StepReport(NamedTuple):
    """One update.

    Attributes:
        step: updates done, this one included.
        loss: nats, mean over the step's labels: per token, per masked token or per text.
        bits_per_byte: the same loss over the UTF-8 bytes of the labels; None, and no key of the
            record, where it is not the likelihood of all text.
        grad_norm: of the whole gradient, before clipping.
        lr: of this update.
        tokens: seen since the start of the run.
        tokens_per_second: of this step.
        seconds: the run's own time since its start, over all resumptions.
        mfu: model FLOPs utilisation of this step; None, and no key of the record, where the device
            is not in the table of models/device_peaks.py.
    """

    step: int
    loss: float
    bits_per_byte: float | None
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    seconds: float
    mfu: float | None = None


class Headline(NamedTuple):
    """The one figure by which evaluations of a run are compared, and what belongs beside it."""

    name: str
    value: float
    beside: str = ""


class HeldoutReport(Protocol):
    """One evaluation on the held-out part: a NamedTuple of an objective's figures."""

    @property
    def step(self) -> int: ...

    @property
    def loss(self) -> float: ...

    def headline(self) -> Headline:
        """The figure that tells whether the run went well."""
        ...

    def describe(self) -> str:
        """All figures as words."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


class Progress(Protocol):
    """Who is told how a run goes; every method returns soon."""

    def message(self, text: str) -> None:
        """Take one line about the run."""
        ...

    def step(self, report: StepReport, steps: int) -> None:
        """Take one update of `steps`."""
        ...

    def evaluation(self, report: HeldoutReport) -> None:
        """Take one evaluation."""
        ...


class Quiet:
    """A Progress that tells nobody."""

    def message(self, text: str) -> None:
        """Drop the line."""

    def step(self, report: StepReport, steps: int) -> None:
        """Drop the report."""

    def evaluation(self, report: HeldoutReport) -> None:
        """Drop the report."""


class Records:
    """metrics.jsonl, evaluations.jsonl and tensorboard/ of one run directory.

    Opening them at `step` cuts off what was written beyond it: those updates are made again.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self._run_dir = run_dir
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for name in (METRICS, EVALUATIONS):
            _cut_back(self._run_dir / name, step)
        self._metrics = _append_to(self._run_dir / METRICS)
        self._evaluations = _append_to(self._run_dir / EVALUATIONS)
        # purge_step hides the points that were written beyond this step.
        self._board = SummaryWriter(str(self._run_dir / TENSORBOARD), purge_step=step + 1)

    def step(
        self, report: StepReport, skipped: str | None = None, outer: OuterReport | None = None
    ) -> None:
        """Write one update, or a skipped one with its reason and its finite figures.

        outer is the outer step behind the update, where there was one.
        """
        row = _row(report) | ({} if outer is None else outer.row())
        if skipped is not None:
            row = {name: value for name, value in row.items() if math.isfinite(value)}
            row |= {"action": "skip", "reason": skipped}
        self._write(row)
        for name in ("loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_second", "mfu"):
            if name in row:
                self._board.add_scalar(f"train/{name}", getattr(report, name), report.step)

    def rollback(self, step: int, *, from_step: int, reason: str, next_sample: int) -> None:
        """Cut off what was written beyond `step`, and write that the run goes on from there."""
        self.close()
        self._open(step)
        self._write(
            {
                "step": step,
                "action": "rollback",
                "from_step": from_step,
                "reason": reason,
                "next_sample": next_sample,
            }
        )

    def _write(self, row: dict[str, Any]) -> None:
        self._metrics.write(_line(row))
        self._metrics.flush()

    def evaluation(self, report: HeldoutReport) -> None:
        """Write one evaluation."""
        self._evaluations.write(_line(_row(report)))
        self._evaluations.flush()
        for name, value in figures(report).items():
            self._board.add_scalar(f"heldout/{name}", value, report.step)

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        for file in (self._metrics, self._evaluations):
            file.flush()
            os.fsync(file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Close the files, every one of them even where one cannot be written to its end."""
        with ExitStack() as stack:
            for file in (self._board, self._evaluations, self._metrics):
                stack.callback(file.close)


def _append_to(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8")


def figures(report: HeldoutReport) -> dict[str, float]:
    """What was found, without counts and the time."""
    row = report._asdict()
    return {name: x for name, x in row.items() if isinstance(x, float) and name != "seconds"}


def _row(report: StepReport | HeldoutReport) -> dict[str, Any]:
    return {name: value for name, value in report._asdict().items() if value is not None}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _cut_back(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`."""
    lines = [json.dumps(row) + "\n" for row in read_records(path) if row["step"] <= step]
    write_atomic(path, "".join(lines).encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a run's JSON lines; a last line that a killed process left unfinished is dropped.

    Raises ValueError with file and line number for any other line that is not JSON.
    """
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is {line[:80]!r}; expected a JSON object with a step; "
                "remove the line"
            ) from error
        rows.append(row)
    return rows


def draw_loss(run_dir: Path) -> Path | None:
    """Draw the loss over the steps as loss.png; None where nothing was measured yet.

    It is in bits per byte where the run has them, else in nats.
    """
    # A rollback has no loss, and neither has a step that was skipped since it was not finite.
    steps = [row for row in read_records(run_dir / METRICS) if "loss" in row]
    evaluations = read_records(run_dir / EVALUATIONS)
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    at = [row["step"] for row in steps]
    key, unit = ("bits_per_byte", "bits per byte")
    if key not in steps[0]:
        key, unit = "loss", "loss in nats"
    values = [row[key] for row in steps]
    axes.plot(at, values, color="0.8", linewidth=0.8, label="training, each step")
    axes.plot(at, smooth(values), color="tab:blue", label="training, smoothed")
    if evaluations:
        heldout = [row[key] for row in evaluations]
        label = f"held-out, {heldout[-1]:.3f} at the end"
        places = [row["step"] for row in evaluations]
        axes.plot(places, heldout, "o-", color="tab:orange", label=label)
    axes.set(xlabel="step", ylabel=unit, title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_atomic(run_dir / PICTURE, picture.getvalue())
    return run_dir / PICTURE


def smooth(values: Sequence[float], span: float = 0.02) -> list[float]:
    """Return the exponential mean over about `span` of the curve, without bias at its start."""
    keep = 1.0 - 1.0 / max(1.0, span * len(values))
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = keep * mean + (1.0 - keep) * value
        weight = keep * weight + (1.0 - keep)
        result.append(mean / weight)
    return result
