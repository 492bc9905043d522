"""The run directory: who may write it, and whether a run may be continued with a configuration."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from transnormer.config import validate
from transnormer.files import read_json, write_atomic
from transnormer.train.recipe import RunConfig

CONFIG, LOCK = "config.json", ".lock"
CHECKPOINTS, DATA = "checkpoints", "data"
# What the run found out about itself, beside the configuration it was given.
RESOLVED = "resolved"

# A change of these leaves the updates already made as they are.
MAY_CHANGE = {
    "train.steps",
    "train.eval_every",
    "train.eval_bytes",
    "train.save_every",
    "train.keep_last",
    "train.max_minutes",
    "output.dir",
}


class RunDirectory(NamedTuple):
    """A run directory in use; new where it held no run before."""

    path: Path
    new: bool


@contextmanager
def open_run(config: RunConfig, *, resume: bool) -> Iterator[RunDirectory]:
    """Give the run directory, locked against a second process, with config.json written.

    Raises ValueError where the directory holds a run and resume is False, where it holds something
    else, or where the run there differs in what makes its result; RuntimeError where another
    process is training in it.
    """
    run_dir = Path(config.output.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"output.dir is {run_dir}, a file; expected a directory; choose another")
    new = _check_use(config, run_dir, resume=resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"output.dir is {run_dir}, where another process is training; expected a free "
                "directory; wait for its end, or choose another"
            ) from error
        (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
        write_config(run_dir, config, {})
        yield RunDirectory(run_dir, new)


@contextmanager
def removed_on_failure(run: RunDirectory) -> Iterator[None]:
    """Remove a new run directory where its preparation fails, so that the next try finds none."""
    try:
        yield
    except BaseException:
        if run.new:
            shutil.rmtree(run.path / DATA, ignore_errors=True)
            for name in (CONFIG, LOCK):
                (run.path / name).unlink(missing_ok=True)
            with suppress(OSError):
                (run.path / CHECKPOINTS).rmdir()
                run.path.rmdir()
        raise


def _check_use(config: RunConfig, run_dir: Path, *, resume: bool) -> bool:
    """Return whether the directory is new."""
    names = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    if CONFIG in names:
        if not resume:
            raise ValueError(
                f"output.dir is {run_dir}, which holds a run; expected a new directory; "
                "continue that run with --resume, or choose another"
            )
        check_same_run(read_run_config(run_dir), config, run_dir)
    elif any(not name.startswith(".") for name in names):
        raise ValueError(
            f"output.dir is {run_dir}, which holds {min(names)} and no run; expected a new "
            "directory; choose another"
        )
    return CONFIG not in names


def write_config(run_dir: Path, config: RunConfig, resolved: dict[str, Any]) -> None:
    """Write config.json: the run's configuration and what came of it."""
    data = {**config.model_dump(mode="json"), RESOLVED: resolved}
    write_atomic(run_dir / CONFIG, (json.dumps(data, indent=2) + "\n").encode())


def read_run_config(run_dir: Path) -> RunConfig:
    """Read a run directory's config.json; ValueError where it is none of a run's."""
    data = read_json(run_dir / CONFIG)
    data.pop(RESOLVED, None)
    return validate(RunConfig, data, source=str(run_dir / CONFIG))


def check_same_run(old: RunConfig, new: RunConfig, run_dir: Path) -> None:
    """Raise ValueError with the first key that would change the result of the run."""
    before, after = _flatten(old.model_dump()), _flatten(new.model_dump())
    for key in sorted(before.keys() | after.keys()):
        if key not in MAY_CHANGE and before.get(key) != after.get(key):
            raise ValueError(
                f"{key} is {after.get(key)!r}; expected {before.get(key)!r}, as the run in "
                f"{run_dir} has; set it back, or start another run in a new directory"
            )


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
