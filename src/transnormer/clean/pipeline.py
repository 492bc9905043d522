"""A cleaning run: stages of tasks, each of which is done once.

    rules       for each unit of the input: read, edit, drop; write what passed with its signatures
    duplicates  one task: find documents that repeat others
    pieces      one task, where it is switched on: find lines or paragraphs that repeat others
    selfclean   one task, where it is switched on: rounds of scoring and dropping
    clean       for each unit: write what is left
    report      one task: add up the counts, draw, remove the intermediate documents

A task writes files of its own and is marked as done after they are complete; a task that was killed
starts again and overwrites them. So a run that is started again goes on where it was, loses nothing
and writes nothing twice.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from datatrove.pipeline.base import PipelineStep

from transnormer.clean.config import CleanConfig
from transnormer.clean.decontaminate import DropContaminated, save_phrases
from transnormer.clean.duplicates import FindDuplicates
from transnormer.clean.executors import make_executor
from transnormer.clean.pieces import FindPieces
from transnormer.clean.places import Places
from transnormer.clean.reader import ReadUnit
from transnormer.clean.report import REPORT, WriteReport
from transnormer.clean.selfclean.stage import SelfClean
from transnormer.clean.sinks import WriteClean, WriteIndexed
from transnormer.clean.steps import rule_steps
from transnormer.clean.units import Unit, need_package, plan_units
from transnormer.files import read_json, write_atomic

_POLL_SECONDS = 0.5

Progress = Callable[[str, int, int], None]
Steps = list[PipelineStep | Callable[..., Any]]


def _silent(stage: str, done: int, tasks: int) -> None:
    pass


def clean_corpus(config: CleanConfig, *, progress: Progress = _silent) -> dict[str, Any] | None:
    """Run a configuration, or go on with it; return the report.

    Args:
        config: what to do.
        progress: called with a stage, its finished tasks and all of them, from another thread.

    Returns None where Slurm was given the tasks: the last of them writes the report.

    Raises FileNotFoundError for input that is not there, ValueError where output.dir holds a run of
    another configuration or other input, RuntimeError where the input's or the output's form needs a
    package that is not installed, OSError for a disk that is full: the same call goes on.
    """
    output = Path(config.output.dir)
    places = Places.of(output)
    if config.output.compression == "zstd":
        need_package("output.compression = 'zstd'", "zstandard", "zstd")
    units = plan_units(config.input.path, config.input.part_bytes)
    _claim(config, units, places, output)
    if config.decontaminate.path and not places.phrases.is_file():
        save_phrases(config.decontaminate, places.phrases)
    executor = None
    for name, steps, tasks in _stages(config, units, places):
        executor = make_executor(
            config.executor,
            steps,
            tasks=tasks,
            name=name,
            logs=places.logs / name,
            after=executor,
        )
        if config.executor.kind != "slurm":
            with _Watch(places.logs / name / "completions", name, tasks, progress):
                executor.run()
    if config.executor.kind == "slurm" and executor is not None:
        # It submits the stages it depends on first.
        executor.run()
        return None
    return read_json(output / REPORT)


def _stages(config: CleanConfig, units: list[Unit], places: Places) -> list[tuple[str, Steps, int]]:
    rules: Steps = [ReadUnit(units, config.input), *rule_steps(config)]
    if config.decontaminate.path:
        rules.append(DropContaminated(places.phrases))
    rules.append(WriteIndexed(config.output, places.indexed, config.dedup))
    size, output = len(units), Path(config.output.dir)
    duplicates = FindDuplicates(places.indexed, places.found, size, config.dedup)
    stages: list[tuple[str, Steps, int]] = [
        ("rules", rules, size),
        ("duplicates", [duplicates], 1),
    ]
    removed, cuts = places.found, None
    if config.dedup.pieces != "none":
        cuts = places.pieces
        pieces = FindPieces(places.indexed, removed, cuts, size, config.dedup)
        stages.append(("pieces", [pieces], 1))
        removed = cuts
    if config.selfclean.rounds:
        rounds = SelfClean(
            places.indexed, removed, places.rounds, size, config.selfclean, output, cuts
        )
        stages.append(("selfclean", [rounds], 1))
        removed = places.rounds
    clean = WriteClean(config.output, places.counts, places.indexed, removed, cuts)
    report = WriteReport(places, size, config)
    return [*stages, ("clean", [clean], size), ("report", [report], 1)]


def _claim(config: CleanConfig, units: list[Unit], places: Places, output: Path) -> None:
    """Make the directory this run's, or see that it is."""
    # Where it runs does not matter to what it does.
    settings = config.model_dump(mode="json", exclude={"executor"})
    plan = {"config": settings, "units": [list(unit) for unit in units]}
    if places.plan.is_file():
        found = read_json(places.plan)
        for name in plan:
            if found.get(name) != orjson.loads(orjson.dumps(plan[name])):
                raise ValueError(
                    f"output.dir is {str(output)!r}, which holds a run of another {name}; expected "
                    "the same or a new directory; delete it or choose another"
                )
        return
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(
            f"output.dir is {str(output)!r}, which is not empty; expected a new directory; choose "
            "another"
        )
    write_atomic(places.plan, orjson.dumps(plan))


class _Watch:
    """Counts the marks of finished tasks while a stage runs."""

    def __init__(self, marks: Path, name: str, tasks: int, progress: Progress) -> None:
        self._marks, self._name, self._tasks, self._progress = marks, name, tasks, progress
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._report()
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self._report()

    def _watch(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            self._report()

    def _report(self) -> None:
        done = len(list(self._marks.iterdir())) if self._marks.is_dir() else 0
        self._progress(self._name, done, self._tasks)
