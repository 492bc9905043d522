"""The run directory: who may write it, and whether a run may be continued with a configuration."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from transnormer.config import validate
from transnormer.files import read_json, write_atomic
from transnormer.train.checkpoints import CHECKPOINTS, find_checkpoint, list_checkpoints
from transnormer.train.metrics import EVALUATIONS, METRICS, TENSORBOARD
from transnormer.train.recipe import RunConfig

CONFIG, LOCK, DATA = "config.json", ".lock", "data"
# What the run found out about itself, beside the configuration it was given; empty until it began.
RESOLVED = "resolved"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)

# A change of these leaves the updates already made as they are.
MAY_CHANGE = {
    "train.steps",
    "train.eval_every",
    "train.eval_bytes",
    "train.save_every",
    "train.keep_last",
    "train.save_async",
    "train.max_minutes",
    "train.float8",
    "profile.steps",
    "profile.rows",
    "output.dir",
    "parallel.dp_replicate",
    "parallel.dp_shard",
    "parallel.sp",
    "parallel.sp_exchange",
    "parallel.sp_overlap",
    "parallel.tp",
    "parallel.tp_residual",
}


class RunDirectory(NamedTuple):
    """A run directory in use; new where no run had begun in it before."""

    path: Path
    new: bool


@contextmanager
def open_run(config: RunConfig, *, resume: bool) -> Iterator[RunDirectory]:
    """Give the run directory, locked against a second process.

    What a failed or killed preparation left there is no run: the directory counts as new.

    Raises ValueError where the directory holds a run and resume is False, where it holds something
    else, or where the run there differs in what makes its result; RuntimeError where another
    process is training in it.
    """
    run_dir = Path(config.output.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"output.dir is {run_dir}, a file; expected a directory; choose another")
    _check_use(config, run_dir, resume=resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"output.dir is {run_dir}, where another process is training; expected a free "
                "directory; wait for its end, or choose another"
            ) from error
        # Once more: another process may have begun a run since.
        yield RunDirectory(run_dir, _check_use(config, run_dir, resume=resume))


@contextmanager
def preparation(run: RunDirectory, config: RunConfig) -> Iterator[None]:
    """Write config.json before anything else, and take all back where a new run cannot begin.

    The directory is then as it was, so that the next try finds nothing in its way.
    """
    for leftover in run.path.glob(".*.tmp"):
        _remove(leftover)
    try:
        if run.new:
            _clear(run.path)
            write_config(run.path, config, {})
        (run.path / CHECKPOINTS).mkdir(exist_ok=True)
        yield
    except BaseException:
        if run.new:
            _clear(run.path)
            (run.path / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                run.path.rmdir()
        raise


def _clear(run_dir: Path) -> None:
    """Remove what preparation makes; config.json, which says whose directory this is, last."""
    for name in (DATA, TENSORBOARD, METRICS, EVALUATIONS):
        _remove(run_dir / name)
    with suppress(OSError):
        (run_dir / CHECKPOINTS).rmdir()
    _remove(run_dir / CONFIG)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors_in_one_line(run_dir: Path) -> Iterator[None]:
    """Raise RuntimeError, which names the last good checkpoint, where the disk refuses a write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not _is_of(run_dir, error):
            raise
        last = find_checkpoint(run_dir).path
        raise RuntimeError(
            f"{run_dir} cannot be written: {error}; expected room and permission to write; the "
            f"last good checkpoint is {last or 'none'}; free space and continue with --resume"
        ) from error


def _is_of(run_dir: Path, error: OSError) -> bool:
    """Return whether an error is a full or broken disk, or names a path of the run directory."""
    if error.errno in _DISK_ERRORS:
        return True
    if error.errno is None or not isinstance(error.filename, str | bytes):
        return False
    path = Path(os.fsdecode(error.filename))
    return path.is_relative_to(run_dir) or run_dir.is_relative_to(path)


def _check_use(config: RunConfig, run_dir: Path, *, resume: bool) -> bool:
    """Return whether no run has begun in the directory; ValueError where it cannot be used."""
    names = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    if CONFIG in names:
        if resume:
            check_same_run(read_run_config(run_dir), config, run_dir)
            return False
        if read_json(run_dir / CONFIG).get(RESOLVED) != {} or list_checkpoints(run_dir):
            raise ValueError(
                f"output.dir is {run_dir}, which holds a run; expected a new directory; "
                "continue that run with --resume, or choose another"
            )
        return True
    foreign = {name for name in names if not name.startswith(".")}
    if CHECKPOINTS in foreign and not any((run_dir / CHECKPOINTS).iterdir()):
        foreign.remove(CHECKPOINTS)
    if foreign:
        raise ValueError(
            f"output.dir is {run_dir}, which holds {min(foreign)} and no run; expected a new "
            "directory; choose another"
        )
    return True


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
    # Keys that one of them lacks last: they follow from a change of another, a kind or a name.
    shared = before.keys() & after.keys()
    for key in sorted(before.keys() | after.keys(), key=lambda key: (key not in shared, key)):
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
