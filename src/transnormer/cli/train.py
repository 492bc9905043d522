"""`transnormer train`: a run from its TOML file, with a progress bar or plain lines."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transnormer.cli import common

if TYPE_CHECKING:
    from transnormer.train.metrics import HeldoutReport, StepReport
    from transnormer.train.recipe import RunConfig
    from transnormer.train.trainer import TrainResult

SIGNAL_CODES = {"SIGINT": 130, "SIGTERM": 143}
SAMPLE_TEMPERATURE = 0.8
# Where there is no terminal, a line this often.
_LINE_SECONDS = 10.0


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a key of the file, e.g. train.steps=100, but not base; may be repeated.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in output.dir.", metavar="")
]


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="What to train.")],
    overrides: Overrides = None,
    resume: Resume = False,
    sample_tokens: Annotated[
        int, typer.Option(help="Let the trained model write so many tokens at the end.")
    ] = 0,
    as_json: common.Json = False,
) -> None:
    """Train a model as a TOML file says, into the run directory output.dir.

    Ctrl-C writes a checkpoint and ends the run with exit code 130, SIGTERM with 143; --resume
    continues it exactly.
    """
    from transnormer.train.recipe import read_run

    config = read_run(run, overrides or [])
    if sample_tokens > 0 and config.objective.kind != "causal":
        raise ValueError(
            f"--sample-tokens is {sample_tokens}; expected 0 for objective.kind = "
            f"{config.objective.kind!r}: only a causal language model writes text"
        )
    result = carry_out(config, resume=resume)
    facts = facts_of(result)
    if sample_tokens > 0 and result.stopped_by not in SIGNAL_CODES:
        facts["sample"] = _sample(result.checkpoint, sample_tokens, config.train.seed)
    finish(result, facts if as_json else None)


def carry_out(config: "RunConfig", *, resume: bool) -> "TrainResult":
    """Train, tell how it goes and what came of it; all processes but the first end here."""
    from transnormer.eval.perplexity import score_texts
    from transnormer.parallel import current_world
    from transnormer.train.trainer import run_training

    progress = make_progress(config.train.steps)
    with progress:
        result = run_training(config, resume=resume, evaluate=score_texts, progress=progress)
    if current_world().rank:
        # One process of many speaks.
        raise typer.Exit(SIGNAL_CODES.get(result.stopped_by, 0))
    _summary(result, resume)
    return result


def finish(result: "TrainResult", facts: dict[str, Any] | None) -> None:
    """Print the facts, where they are wanted, and end with the exit code of a signal."""
    if facts is not None:
        common.print_json(facts)
    if result.stopped_by in SIGNAL_CODES:
        raise typer.Exit(SIGNAL_CODES[result.stopped_by])


def _summary(result: "TrainResult", resume: bool) -> None:
    if result.first is not None and result.last is not None:
        before, after = result.first.headline(), result.last.headline()
        beside = f"; {after.beside}" if after.beside else ""
        common.write_line(
            f"held-out {after.name}: {before.value:.3f} before (step {result.first.step}), "
            f"{after.value:.3f} after (step {result.last.step}){beside}"
        )
    common.write_line(
        f"{result.step:,} steps in {clock(result.seconds)}; the run is in {result.run_dir}"
    )
    if result.stopped_by != "steps":
        again = "" if resume else " --resume"
        if result.stopped_by == "max_minutes":
            again += " with a larger train.max_minutes"
        common.write_line(
            f"stopped by {result.stopped_by}; the same command{again} continues the run"
        )


def _sample(checkpoint: Path, tokens: int, seed: int) -> str:
    """Stream what the trained model writes from nothing, and return it."""
    import torch

    from transnormer.infer.generate import generate
    from transnormer.infer.text import TextStream, begin_id

    model = common.open_model(str(checkpoint), "auto", None)
    words = common.open_tokenizer(str(checkpoint), None, model)
    common.write_line(f"a sample ({tokens} tokens, temperature {SAMPLE_TEMPERATURE}):")
    ids = torch.tensor([[begin_id(model, words)]])
    generation = generate(
        model, ids, max_new_tokens=tokens, temperature=SAMPLE_TEMPERATURE, seed=seed
    )
    text = common.stream_out(TextStream(generation, words, from_start=True))
    common.write_line("")
    return text


def facts_of(result: "TrainResult") -> dict[str, Any]:
    """What --json prints of a run."""

    def report(found: "HeldoutReport | None") -> dict[str, Any] | None:
        return None if found is None else found._asdict()

    return {
        "run_dir": str(result.run_dir),
        "checkpoint": str(result.checkpoint),
        "step": result.step,
        "stopped_by": result.stopped_by,
        "seconds": result.seconds,
        "heldout_before": report(result.first),
        "heldout_after": report(result.last),
    }


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(report: "StepReport", steps: int) -> str:
    """One update as a line."""
    bits = "" if report.bits_per_byte is None else f"{report.bits_per_byte:.3f} bits per byte  "
    return (
        f"step {report.step:,}/{steps:,}  loss {report.loss:.4f}  "
        f"{bits}{report.tokens_per_second:,.0f} tokens/s{utilisation(report)}"
    )


def utilisation(report: "StepReport") -> str:
    """The share of the device's arithmetic that the model needed, where it is known."""
    return "" if report.mfu is None else f"  MFU {report.mfu:.1%}"


def describe_evaluation(report: "HeldoutReport") -> str:
    """One evaluation as a line."""
    return f"held-out at step {report.step:,}: {report.describe()}"


def make_progress(steps: int) -> "PlainProgress | BarProgress":
    """A bar on a terminal, plain lines elsewhere."""
    return BarProgress(steps) if sys.stdout.isatty() else PlainProgress(time.monotonic)


class PlainProgress:
    """A line for the first and the last update, one every ten seconds, and one an evaluation."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._next = -1.0
        self._rate = _Rate(now)

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def message(self, text: str) -> None:
        """Print one line."""
        common.write_line(text)

    def step(self, report: "StepReport", steps: int) -> None:
        """Print an update if it is time."""
        left = self._rate.seconds_left(report.step, steps)
        if self._now() >= self._next or report.step == steps:
            self._next = self._now() + _LINE_SECONDS
            self.message(f"{describe(report, steps)}  {clock(left)} left")

    def evaluation(self, report: "HeldoutReport") -> None:
        """Print an evaluation."""
        self.message(describe_evaluation(report))


class BarProgress:
    """One bar with step, loss, bits per byte, tokens per second and the time left."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            expand=True,
        )
        self._task = self._bar.add_task("train", total=steps, figures="starting", start=False)
        self._started = False

    def __enter__(self) -> "BarProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """Print one line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def step(self, report: "StepReport", steps: int) -> None:
        """Move the bar."""
        if not self._started:
            # A resumed run starts in the middle: the time left is judged from its own steps.
            self._started = True
            self._bar.update(self._task, completed=report.step)
            self._bar.start_task(self._task)
        bits = "" if report.bits_per_byte is None else f"{report.bits_per_byte:.3f} bits/byte  "
        rate = f"{report.tokens_per_second:,.0f} tokens/s{utilisation(report)}"
        figures = f"loss {report.loss:.3f}  {bits}{rate}"
        self._bar.update(self._task, completed=report.step, figures=figures)

    def evaluation(self, report: "HeldoutReport") -> None:
        """Print an evaluation above the bar."""
        self.message(describe_evaluation(report))


class _Rate:
    """The time left, from the updates seen since the first."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._first: tuple[int, float] | None = None

    def seconds_left(self, step: int, steps: int) -> float:
        if self._first is None:
            self._first = (step, self._now())
        done, since = step - self._first[0], self._now() - self._first[1]
        return since / done * (steps - step) if done else 0.0
