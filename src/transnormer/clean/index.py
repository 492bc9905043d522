"""The documents that passed the rules, on disk, and what the search for duplicates needs of them.

For each unit NNNNN of the input

    NNNNN.jsonl    the documents, a line each
    NNNNN.npz      sizes uint32 [documents] of the lines; digests uint64 [documents, 2];
                   bands uint32 [documents, bands]; sampled uint64 [...], every 64th shingle by its
                   hash, with sampled_ends int64 [documents]; empty but for containment

Sizes, digests and bands are at most 100 bytes a document; in memory are the sizes and one column.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson

from transnormer.clean.item import Item
from transnormer.clean.rules.pii import Span

SAMPLED = 64


def unit_name(rank: int) -> str:
    """What the files of a unit are called."""
    return f"{rank:05d}"


def to_line(item: Item) -> bytes:
    """An item as a line of JSON with all that later steps need."""
    return orjson.dumps(
        {
            "id": item.id,
            "text": item.text,
            "fields": item.metadata,
            "bytes": item.read_bytes,
            "edits": {name: times for name, times in item.edits.items() if times},
            "pii": [list(span) for span in item.pii],
            "language": item.language,
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


def from_line(line: bytes) -> Item:
    """The item that `to_line` wrote."""
    data = orjson.loads(line)
    item = Item(text=data["text"], id=data["id"], metadata=data["fields"])
    item.read_bytes, item.language = data["bytes"], data["language"]
    item.edits.update(data["edits"])
    item.pii = [Span(*span) for span in data["pii"]]
    return item


class Index:
    """All units of a run as one list of documents, numbered in the order of the input."""

    def __init__(self, directory: Path, units: int) -> None:
        self._directory, self._units = directory, units
        sizes = [self._load(unit, "sizes") for unit in range(units)]
        counts = [len(found) for found in sizes]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self._offsets = [np.cumsum(np.append(0, found), dtype=np.int64) for found in sizes]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _load(self, unit: int, name: str) -> np.ndarray:
        with np.load(self._directory / f"{unit_name(unit)}.npz", allow_pickle=False) as data:
            return data[name]

    def column(self, name: str, place: int | None = None) -> np.ndarray:
        """One array of all documents, or one column of it."""
        parts = (self._load(unit, name) for unit in range(self._units))
        # A copy, or the column would keep its table in memory.
        return np.concatenate([part if place is None else part[:, place].copy() for part in parts])

    def sampled(self) -> tuple[np.ndarray, np.ndarray]:
        """Every sampled shingle and the document it stands in, uint64 and int64."""
        hashes, owners = [], []
        for unit in range(self._units):
            found, ends = self._load(unit, "sampled"), self._load(unit, "sampled_ends")
            counts = np.diff(np.concatenate([[0], ends]))
            hashes.append(found)
            owners.append(self.starts[unit] + np.repeat(np.arange(len(ends)), counts))
        return np.concatenate(hashes), np.concatenate(owners)

    def place(self, number: int) -> tuple[int, int]:
        """The unit of a document, and its number there."""
        unit = int(np.searchsorted(self.starts, number, side="right")) - 1
        return unit, number - int(self.starts[unit])

    def items(self) -> Iterator[Item]:
        """Read all documents in their order."""
        for unit in range(self._units):
            with (self._directory / f"{unit_name(unit)}.jsonl").open("rb") as stream:
                yield from map(from_line, stream)

    def text(self, number: int) -> str:
        """The text of one document."""
        return self.item(number).text

    def name(self, number: int) -> str:
        """The id of one document."""
        return self.item(number).id

    def item(self, number: int) -> Item:
        """Read one document."""
        unit, at = self.place(number)
        start, end = int(self._offsets[unit][at]), int(self._offsets[unit][at + 1])
        with (self._directory / f"{unit_name(unit)}.jsonl").open("rb") as stream:
            stream.seek(start)
            return from_line(stream.read(end - start))
