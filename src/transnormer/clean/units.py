"""The parts that an input is cut into, each the work of one task."""

import glob
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from transnormer.files import COMPRESSED_SUFFIXES

LINES, TEXT, WARC, TABLE = "lines", "text", "warc", "table"
_KINDS = {
    ".jsonl": LINES,
    ".txt": TEXT,
    ".md": TEXT,
    ".html": TEXT,
    ".htm": TEXT,
    ".warc": WARC,
    ".parquet": TABLE,
}
# Documents that go to one share of a compressed file before the next share has its turn.
TURN = 64
# A compressed file is taken to hold so much more text.
_EXPANSION = 4
_BLOCK = 1 << 20


class Unit(NamedTuple):
    """A part of the input.

    Attributes:
        path: the file.
        kind: LINES, TEXT, WARC or TABLE.
        start, end: bytes of a plain file of lines; a line belongs to the part it begins in.
        lines: how many end before `start`, so that a part can name its lines.
        share, shares: of any other file: TURN documents in turn for each share.
    """

    path: str
    kind: str
    start: int
    end: int
    lines: int = 0
    share: int = 0
    shares: int = 1


def file_kind(path: Path) -> str | None:
    """What a file holds, by its name; None for a kind that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def plan_units(pattern: str, part_bytes: int) -> list[Unit]:
    """Cut what a file, a directory or a glob means into parts; the order is that of the names.

    Raises FileNotFoundError where nothing that can be read matches, ValueError for part_bytes and
    for a file whose name is not UTF-8: documents are named by it; RuntimeError for a file whose
    package is not installed, before any is read.
    """
    if part_bytes < 1:
        raise ValueError(f"input.part_bytes is {part_bytes}; expected at least 1")
    root = Path(pattern)
    if root.is_file():
        found = [root]
    elif root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    else:
        found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    for path in found:
        _check_packages(path)
    units = [unit for path in found for unit in _cut(path, part_bytes)]
    if not units:
        raise FileNotFoundError(
            f"input.path is {pattern!r}, which matches no {', '.join(_KINDS)} file, plain or "
            f"{', '.join(COMPRESSED_SUFFIXES)}; expected at least one; check the path"
        )
    return units


def need_package(what: object, package: str, extra: str) -> None:
    """Raise RuntimeError where a package that the extra "clean" does not bring is not installed."""
    if find_spec(package) is None:
        raise RuntimeError(f"{what} needs {package}; run: pip install 'transnormer[{extra}]'")


def _check_packages(path: Path) -> None:
    kind = file_kind(path)
    if kind == TABLE:
        need_package(path, "pyarrow", "parquet")
    if kind is not None and path.suffix.lower() == ".zst":
        need_package(path, "zstandard", "zstd")


def _cut(path: Path, part_bytes: int) -> list[Unit]:
    kind, size = file_kind(path), path.stat().st_size
    if kind is None:
        return []
    if not _is_utf8(str(path)):
        raise ValueError(
            f"input.path holds {str(path)!r}; expected names of files in UTF-8; rename it"
        )
    packed = path.suffix.lower() in COMPRESSED_SUFFIXES
    if kind == LINES and not packed:
        starts = list(range(0, max(size, 1), part_bytes))
        before = _lines_before(path, starts)
        return [
            Unit(str(path), kind, start, min(start + part_bytes, size), lines)
            for start, lines in zip(starts, before, strict=True)
        ]
    if kind == TEXT:
        return [Unit(str(path), kind, 0, size)]
    shares = max(1, -(-size * (_EXPANSION if packed else 1) // part_bytes))
    return [Unit(str(path), kind, 0, size, 0, share, shares) for share in range(shares)]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines_before(path: Path, starts: list[int]) -> list[int]:
    """How many lines end before each of some places of a file; the file is read once."""
    counts, total = [0], 0
    with path.open("rb") as stream:
        for start, end in zip(starts, starts[1:]):
            left = end - start
            while left > 0 and (block := stream.read(min(_BLOCK, left))):
                total += block.count(b"\n")
                left -= len(block)
            counts.append(total)
    return counts
