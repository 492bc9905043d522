"""Checkpoints of a run: whole or absent, checked before they are loaded.

A checkpoint is a folder `checkpoints/step_XXXXXXXX`, written under a temporary name and renamed.
Its COMPLETE file, written last, lists size and SHA-256 of every other file.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transnormer.config import Config, validate
from transnormer.data.tokenizers import Tokenizer
from transnormer.files import read_json, sha256, sync, write_json
from transnormer.models.random_state import set_random_state
from transnormer.train.sync import Staged

COMPLETE, CHECKPOINTS = "COMPLETE", "checkpoints"
RANDOM, COUNTERS = "random.safetensors", "trainer.json"
GUARD = "guard.safetensors"
_TEMPORARY = ".partial-"
_STEP = re.compile(r"step_(\d{8,})")


class Counters(Config):
    """Where a run stands.

    Attributes:
        step: updates done.
        next_sample: global index of the next sample: all that the data's order needs.
        tokens: tokens seen.
        seconds: the run's own time.
        precision: of the forward pass, `auto` resolved.
    """

    step: int = Field(ge=0)
    next_sample: int = Field(ge=0)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    precision: str


class FileFacts(Config):
    """What a file of a checkpoint was when it was written."""

    bytes: int
    sha256: str


class Marker(Config):
    """The COMPLETE file: every other file of the checkpoint by its name."""

    format: Literal["transnormer-checkpoint-1"] = "transnormer-checkpoint-1"
    files: dict[str, FileFacts] = Field(min_length=1)


class Damaged(NamedTuple):
    """A checkpoint that must not be loaded, and what is wrong with it."""

    path: Path
    reason: str


class Found(NamedTuple):
    """The newest whole checkpoint, None where there is none, and the damaged newer ones."""

    path: Path | None
    damaged: list[Damaged]


def step_path(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders by step, newest first, damaged ones included."""
    folder = run_dir / CHECKPOINTS
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and (match := _STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def find_checkpoint(run_dir: Path, *, before: int | None = None) -> Found:
    """Return the newest checkpoint whose every file is as it was written.

    With `before`, of the steps before this one.
    """
    damaged = []
    for path in list_checkpoints(run_dir):
        if before is not None and int(path.name.removeprefix("step_")) >= before:
            continue
        reason = what_is_wrong(path)
        if reason is None:
            return Found(path, damaged)
        damaged.append(Damaged(path, reason))
    return Found(None, damaged)


def what_is_wrong(path: Path) -> str | None:
    """Check a checkpoint against its COMPLETE file; None where all is well."""
    marker = path / COMPLETE
    if not marker.is_file():
        return f"{path} has no {COMPLETE} file"
    try:
        files = validate(Marker, read_json(marker), source=COMPLETE).files
    except ValueError as error:
        return f"{marker} is damaged: {error}"
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != facts.bytes:
            return f"{file} has {file.stat().st_size} bytes; {COMPLETE} says {facts.bytes}"
        if sha256(file) != facts.sha256:
            return f"{file} has another SHA-256 than {COMPLETE} says"
    return None


class Contents(NamedTuple):
    """What a checkpoint keeps beside weights and optimizer, as it was when those were taken.

    Attributes:
        counters: where the run stands.
        tokenizer: of the run.
        random: the state of the first process's random numbers.
        guard: what a loss-spike guard needs to go on; None without one.
        own: a hidden folder of what each process alone holds, moved into the checkpoint, where it
            is not hidden.
    """

    counters: Counters
    tokenizer: Tokenizer
    random: Mapping[str, Tensor]
    guard: Mapping[str, Tensor] | None
    own: Path | None


def write_checkpoint(run_dir: Path, staged: Staged, contents: Contents, *, keep_last: int) -> Path:
    """Write a whole checkpoint, then drop all but the newest keep_last (0 keeps all).

    All processes call it, beside the training or not.

    Raises RuntimeError in one line, on all processes, where the disk refuses one of them; older
    checkpoints are then untouched.
    """
    target = step_path(run_dir, contents.counters.step)
    temporary = target.parent / f"{_TEMPORARY}{target.name}"

    def begin() -> None:
        remove_leftovers(run_dir)
        temporary.mkdir(parents=True)

    with refused_in_one_line(run_dir, contents.counters.step):
        try:
            staged.from_first(begin)
            staged.write(temporary, tokenizer_fingerprint=contents.tokenizer.fingerprint)
            staged.from_first(lambda: _complete(run_dir, temporary, target, contents, keep_last))
        except (OSError, SafetensorError):
            for folder in (temporary, contents.own):
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
            raise
    return target


@contextmanager
def refused_in_one_line(run_dir: Path, step: int) -> Iterator[None]:
    """Raise RuntimeError, which names the last good checkpoint, where the disk refuses a step's."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        last = find_checkpoint(run_dir).path
        raise RuntimeError(
            f"checkpoint of step {step} cannot be written: {error}; expected room in "
            f"{run_dir / CHECKPOINTS}; the last good checkpoint is {last or 'none'}; free space and "
            "continue with --resume"
        ) from error


def _complete(
    run_dir: Path, temporary: Path, target: Path, contents: Contents, keep_last: int
) -> None:
    contents.tokenizer.save(temporary)
    _save(contents.random, temporary / RANDOM)
    if contents.guard is not None:
        _save(contents.guard, temporary / GUARD)
    if contents.own is not None:
        contents.own.rename(temporary / contents.own.name.removeprefix("."))
    write_json(contents.counters.model_dump(), temporary / COUNTERS)
    _write_marker(temporary)
    # Aside and no more: while a large one is being removed, the new one is there already.
    doomed = _doomed(target) if target.exists() else None
    temporary.rename(target)
    sync(target.parent)
    if doomed is not None:
        shutil.rmtree(doomed)
    for old in list_checkpoints(run_dir)[keep_last:] if keep_last else ():
        _remove(old)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _write_marker(folder: Path) -> None:
    files: dict[str, FileFacts] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
            name = path.relative_to(folder).as_posix()
            files[name] = FileFacts(bytes=path.stat().st_size, sha256=sha256(path))
    write_json(Marker(files=files).model_dump(), folder / COMPLETE)
    sync(folder)


def _remove(path: Path) -> None:
    """Remove a folder so that no half of it ever bears its name."""
    shutil.rmtree(_doomed(path))


def _doomed(path: Path) -> Path:
    """Rename a folder that is to be removed; its new name."""
    return path.rename(path.parent / f"{_TEMPORARY}old-{path.name}")


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one; return its new name."""
    aside = path.parent / f"damaged-{path.name}"
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)


def remove_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a rollback gave up."""
    for path in list_checkpoints(run_dir):
        if path.name > step_path(run_dir, step).name:
            _remove(path)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for path in (run_dir / CHECKPOINTS).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def read_counters(path: Path) -> Counters:
    """Read where a checkpoint's run stands."""
    return validate(Counters, read_json(path / COUNTERS), source=str(path / COUNTERS))


def read_guard(path: Path) -> dict[str, Tensor]:
    """Read what a checkpoint keeps for the loss-spike guard."""
    return load_file(path / GUARD)


def restore_random_state(path: Path) -> None:
    """Put the random state of a checkpoint back."""
    set_random_state(load_file(path / RANDOM))
