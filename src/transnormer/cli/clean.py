"""`transnormer clean`: a cleaning run from its TOML file."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from transnormer.cli import common


def clean(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="What to clean, and how.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a key of the file, e.g. dedup.near=false; may be repeated.",
            show_default=False,
        ),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Clean a corpus as a TOML file says, into the directory output.dir.

    It then holds clean/, dropped/ and quarantined/ (JSON lines), report.html and report.json. The
    same command continues a run that was interrupted.
    """
    try:
        from transnormer.clean.config import read_clean_config
        from transnormer.clean.pipeline import clean_corpus
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"clean needs {error.name}; run: pip install 'transnormer[clean]'"
        ) from error
    config = read_clean_config(run, overrides or [])
    with _Lines() as lines:
        report = clean_corpus(config, progress=lines.show)
    if report is None:
        common.write_line(f"the tasks are Slurm's; the report will be in {config.output.dir}")
        return
    facts = _facts(config.output.dir, report)
    common.write_line(
        f"{facts['read']:,} documents read, {facts['kept']:,} kept, {facts['dropped']:,} dropped, "
        f"{facts['quarantined']:,} quarantined; {facts['report']} shows why"
    )
    if as_json:
        common.print_json(facts)


def _facts(directory: str, report: dict[str, Any]) -> dict[str, Any]:
    names = ("read", "kept", "dropped", "quarantined")
    return {
        "dir": directory,
        **{name: report["documents"].get(name, 0) for name in names},
        "report": str(Path(directory) / "report.html"),
    }


class _Lines:
    """A bar for each stage on a terminal; elsewhere a line when a stage ends."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._ended: set[str] = set()

    def __enter__(self) -> "_Lines":
        if sys.stdout.isatty():
            from rich.progress import Progress

            self._bar = Progress()
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, stage: str, done: int, tasks: int) -> None:
        """Show how far a stage is."""
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=tasks)
            self._bar.update(self._tasks[stage], completed=done)
        elif done == tasks and stage not in self._ended:
            self._ended.add(stage)
            common.write_line(f"{stage}: {done} of {tasks} tasks done")
