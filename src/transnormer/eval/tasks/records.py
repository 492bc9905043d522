"""Records of local task files: JSON lines, plain or compressed; errors name the line."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transnormer.data.documents import read_records
from transnormer.files import COMPRESSED_SUFFIXES


class Record:
    """One line of a file, whose fields are checked as they are read.

    Attributes:
        where: "file:line".
    """

    def __init__(self, where: str, fields: Any) -> None:
        """Keep the fields; raises ValueError for what is no object."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"{where} is no object; expected one on each line")
        self.where, self._fields = where, fields

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def text(self, name: str) -> str:
        """A string; raises ValueError for anything else."""
        value = self._value(name)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name} is {value!r}; expected a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Two strings or more; raises ValueError for anything else."""
        value = self._value(name)
        good = isinstance(value, list) and all(isinstance(x, str) and x for x in value)
        if not good or len(value) < 2:
            raise ValueError(f"{self.where}: {name} is {value!r}; expected at least two strings")
        return tuple(value)

    def index(self, name: str, count: int) -> int:
        """An index below a count, or the letter that stands for it; else ValueError."""
        value = self._value(name)
        if isinstance(value, str) and len(value) == 1:
            value = ord(value.upper()) - ord("A")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise ValueError(
                f"{self.where}: {name} is {self._fields[name]!r}; expected an index from 0 to "
                f"{count - 1}, or its letter"
            )
        return value

    def _value(self, name: str) -> Any:
        if name not in self._fields:
            known = ", ".join(sorted(map(str, self._fields))) or "none"
            raise ValueError(
                f"{self.where} has no field {name!r}; expected it; its fields are {known}"
            )
        return self._fields[name]


def records(path: Path) -> Iterator[Record]:
    """The lines of a file of JSON lines.

    Raises:
        ValueError: bad JSON, bad UTF-8, a damaged archive, no line at all; the file is named.
    """
    empty = True
    for where, fields in read_records(path):
        empty = False
        yield Record(where, fields)
    if empty:
        raise ValueError(f"{path} is empty; expected one object on each line")


def find_file(directory: Path, names: tuple[str, ...]) -> Path | None:
    """The first of some names below a directory, as it is or compressed; None for none."""
    for name in names:
        for suffix in ("", *COMPRESSED_SUFFIXES):
            path = directory / f"{name}{suffix}"
            if path.exists():
                return path
    return None
