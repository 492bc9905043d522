"""Parts of documents, lines or paragraphs: where they stand, and what finds those that repeat.

A part is a document of its own to the search for duplicates: the same digests, bands and exact
check. Parts of fewer than `dedup.piece_words` words, code, and blocks with a displayed formula are
no parts: short lines are everybody's, and what must survive byte for byte is not cut.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from datatrove.pipeline.base import PipelineStep

from transnormer.clean.arrays import save_arrays
from transnormer.clean.config import DedupConfig
from transnormer.clean.duplicates import Search, Why
from transnormer.clean.index import Index, unit_name
from transnormer.clean.item import Item
from transnormer.clean.minhash import MinHash
from transnormer.clean.rules.markup import code_lines
from transnormer.clean.rules.quality import Measures
from transnormer.clean.rules.text import tidy_lines
from transnormer.clean.words import mix, shingles
from transnormer.files import read_json, write_atomic

LINES, PARAGRAPHS = "lines", "paragraphs"
_FORMULA = re.compile(r"\$\$|\\\[|\\\]|\\begin\{|\\end\{")
_SECOND = np.uint64(0x9E3779B97F4A7C15)


def find_pieces(text: str, kind: Literal["lines", "paragraphs"]) -> list[tuple[int, int]]:
    """Where the parts of a text stand, [start, end) in characters with the line end.

    A paragraph ends at a blank line.
    """
    lines = text.split("\n")
    spans: list[tuple[int, int]] = []
    start = at = 0
    whole = True
    for line, code in zip([*lines, ""], [*code_lines(lines), False], strict=True):
        end = min(at + len(line) + 1, len(text))
        blank = not line.strip()
        if kind == LINES:
            if not blank and not code and not _FORMULA.search(line):
                spans.append((at, end))
        elif blank:
            if at > start and whole and not _FORMULA.search(text, start, at):
                spans.append((start, at))
            start, whole = end, True
        else:
            whole = whole and not code
        at = end
    return spans


class PieceTable:
    """Collects what the search needs of a unit's parts."""

    def __init__(self, config: DedupConfig, minhash: MinHash) -> None:
        self._config, self._minhash = config, minhash
        self._owners: list[np.ndarray] = []
        self._spans: list[np.ndarray] = []
        self._digests: list[np.ndarray] = []
        self._bands: list[np.ndarray] = []

    def add(self, place: int, measures: Measures) -> None:
        """Add the parts of the document that has this place in the unit."""
        if self._config.pieces == "none" or not measures.num_words:
            return
        spans = np.array(find_pieces(measures.text, self._config.pieces), dtype=np.int64)
        spans = spans.reshape(-1, 2)
        first, last = np.searchsorted(measures.words.starts, spans).T
        enough = last - first >= self._config.piece_words
        spans, first, last = spans[enough], first[enough], last[enough]
        if not len(spans):
            return
        size = self._config.shingle_words
        elements = shingles(measures.words.hashes, size)
        # The shingles that lie within a part stand side by side.
        last = last - size + 1
        edges = np.stack([first, last], axis=1).reshape(-1)
        # A sum over the shingles: equal for equal parts, and one more value for the last edge.
        digests = [
            np.add.reduceat(np.append(values, np.uint64(0)), edges)[::2]
            for values in (elements, mix(elements * _SECOND))
        ]
        self._owners.append(np.full(len(spans), place, dtype=np.int64))
        self._spans.append(spans)
        self._digests.append(np.stack(digests, axis=1))
        self._bands.append(self._minhash.bands_of_ranges(elements, first, last))

    def save(self, path: Path) -> None:
        """Write owners int64 [pieces], spans, digests and bands as the documents have them."""
        save_arrays(
            path,
            owners=np.concatenate([np.zeros(0, np.int64), *self._owners]),
            spans=np.concatenate([np.zeros((0, 2), np.int64), *self._spans]),
            digests=np.concatenate([np.zeros((0, 2), np.uint64), *self._digests]),
            bands=np.concatenate([np.zeros((0, self._config.bands), np.uint32), *self._bands]),
        )


class PieceIndex:
    """All parts of a run as one list, in the order of the input."""

    def __init__(self, index: Index, directory: Path, units: int) -> None:
        self._index, self._paths = index, [pieces_path(directory, unit) for unit in range(units)]
        owners = [index.starts[unit] + self._load(unit, "owners") for unit in range(units)]
        self.owners = np.concatenate([np.zeros(0, np.int64), *owners])
        self.spans = self.column("spans")
        self._last: tuple[int, str] = (-1, "")

    def __len__(self) -> int:
        return len(self.owners)

    def _load(self, unit: int, name: str) -> np.ndarray:
        with np.load(self._paths[unit], allow_pickle=False) as data:
            return data[name]

    def column(self, name: str, place: int | None = None) -> np.ndarray:
        """One array of all parts, or one column of it."""
        parts = (self._load(unit, name) for unit in range(len(self._paths)))
        # A copy, or the column would keep its table in memory.
        return np.concatenate([part if place is None else part[:, place].copy() for part in parts])

    def text(self, number: int) -> str:
        """Read one part."""
        owner = int(self.owners[number])
        if self._last[0] != owner:
            self._last = owner, self._index.text(owner)
        start, end = self.spans[number]
        return self._last[1][start:end]

    def name(self, number: int) -> str:
        """The id of the document that a part is of."""
        return self._index.name(int(self.owners[number]))


class _PieceSearch(Search):
    """Parts of one document are not compared: what repeats within a text may be its form."""

    def __init__(self, index: PieceIndex, config: DedupConfig, gone: Iterable[int]) -> None:
        super().__init__(index, config, gone)
        self._owners = index.owners

    def drop(self, number: int, reason: str, kept: int, similarity: float) -> None:
        """Drop a part, unless what it repeats is of its own document."""
        if self._owners[number] != self._owners[kept]:
            super().drop(number, reason, kept, similarity)


def pieces_path(directory: Path, unit: int) -> Path:
    """The file of a unit's parts."""
    return directory / f"{unit_name(unit)}_pieces.npz"


def cuts_path(directory: Path, unit: int) -> Path:
    """The file that says what is cut from a unit's documents."""
    return directory / f"{unit_name(unit)}_cuts.json"


def cut(item: Item, cuts: list[Why]) -> None:
    """Take parts out of a document."""
    out, at = [], 0
    for part in cuts:
        out.append(item.text[at : part["start"]])
        at = part["end"]
    out.append(item.text[at:])
    item.text = tidy_lines("".join(out))
    item.edits["repeated_pieces"] += len(cuts)


class FindPieces(PipelineStep):
    """One task over all units: what to cut, and which documents have nothing else.

    Writes NNNNN_cuts.json, for each document its cuts in order, and NNNNN.json, what FindDuplicates
    wrote and why each document of cuts and less than a part is dropped.
    """

    type = "dedup"
    name = "pieces"

    def __init__(
        self, indexed: Path, found: Path, target: Path, units: int, config: DedupConfig
    ) -> None:
        super().__init__()
        self._indexed, self._found, self._target = indexed, found, target
        self._units, self._config = units, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Find and write; nothing is passed on."""
        index = Index(self._indexed, self._units)
        pieces = PieceIndex(index, self._indexed, self._units)
        removed = [
            read_json(self._found / f"{unit_name(unit)}.json") for unit in range(self._units)
        ]
        alive = np.ones(len(index), dtype=bool)
        for unit, whys in enumerate(removed):
            alive[[int(index.starts[unit]) + int(place) for place in whys]] = False
        search = _PieceSearch(pieces, self._config, np.flatnonzero(~alive[pieces.owners]))
        cuts: dict[int, list[Why]] = {}
        for number, why in sorted(search.run().items()):
            start, end = map(int, pieces.spans[number])
            entry = {"start": start, "end": end, **why}
            cuts.setdefault(int(pieces.owners[number]), []).append(entry)
        by_unit: list[dict[str, list[Why]]] = [{} for _ in removed]
        for number, found in cuts.items():
            unit, place = index.place(number)
            item = index.item(number)
            cut(item, found)
            if Measures(item.text).num_words < self._config.piece_words:
                removed[unit][str(place)] = {
                    "step": "duplicates",
                    "reason": "pieces",
                    "duplicate_of": found[0]["duplicate_of"],
                    "similarity": found[0]["similarity"],
                }
            else:
                by_unit[unit][str(place)] = found
        counts = {
            "pieces": len(pieces),
            "candidates": search.num_candidates,
            "verified": search.num_verified,
        }
        for unit in range(self._units):
            write_atomic(cuts_path(self._target, unit), orjson.dumps(by_unit[unit]))
            write_atomic(self._target / f"{unit_name(unit)}.json", orjson.dumps(removed[unit]))
        write_atomic(self._target / "counts.json", orjson.dumps(counts))
        yield from ()
