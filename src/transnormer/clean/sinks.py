"""The ends of the two pipelines over units: the intermediate documents, and the cleaned ones."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter

from transnormer.clean.arrays import save_arrays
from transnormer.clean.config import DedupConfig, OutputConfig
from transnormer.clean.excerpt import begins
from transnormer.clean.index import SAMPLED, from_line, to_line, unit_name
from transnormer.clean.item import DROPPED, QUARANTINED, Item
from transnormer.clean.minhash import MinHash
from transnormer.clean.pieces import PieceTable, cut, cuts_path, pieces_path
from transnormer.clean.rules.quality import Measures
from transnormer.clean.tally import Tally
from transnormer.clean.words import shingles
from transnormer.files import read_json, write_atomic

CLEAN = "clean"


def _as_clean(self: JsonlWriter, item: Item) -> dict[str, Any]:
    edits = {name: times for name, times in item.edits.items() if times}
    mine = {
        "id": item.id,
        "text": item.text,
        "edits": edits,
        "pii": [list(span) for span in item.pii],
    }
    return {**item.metadata, **mine, "language": item.language}


def _as_left(self: JsonlWriter, item: Item) -> dict[str, Any]:
    shown = {"begins": begins(item.text)} if item.out == DROPPED else {}
    return {"id": item.id, **item.why, **shown}


def writer(output: OutputConfig, folder: str, name: str = "") -> JsonlWriter:
    """One of datatrove's writers, a file for each unit; a task that runs again overwrites it."""
    return JsonlWriter(
        str(Path(output.dir) / folder),
        output_filename=f"{name}${{rank}}.jsonl",
        compression=None if output.compression == "none" else output.compression,
        adapter=_as_clean if folder == CLEAN else _as_left,
    )


class _Sink(PipelineStep):
    """Writes what was dropped and quarantined, and counts; a subclass writes what is kept."""

    type = "write"

    def __init__(self, output: OutputConfig, directory: Path, prefix: str) -> None:
        super().__init__()
        self._directory = directory
        self._dropped = writer(output, DROPPED, prefix)
        self._quarantined = writer(output, QUARANTINED)
        self._tally = Tally()
        self._began = self._used = 0.0

    def begin(self) -> None:
        """Start the clocks of a unit."""
        self._began, self._used = time.monotonic(), time.process_time()

    def leave(self, item: Item, rank: int) -> None:
        """Write an item that is out of the corpus."""
        target = self._quarantined if item.out == QUARANTINED else self._dropped
        target.write(item, rank)
        self._tally.left(item)

    def finish(self, rank: int) -> None:
        """Write the counts: the last file of a unit."""
        self._dropped.close()
        self._quarantined.close()
        data = {
            **self._tally.dump(),
            "seconds": time.monotonic() - self._began,
            "cpu_seconds": time.process_time() - self._used,
        }
        write_atomic(self._directory / f"{unit_name(rank)}.json", orjson.dumps(data))


class WriteIndexed(_Sink):
    """Ends the rules: writes the documents that passed, with their signatures."""

    name = "documents and signatures"

    def __init__(self, output: OutputConfig, directory: Path, dedup: DedupConfig) -> None:
        super().__init__(output, directory, "rules_")
        self._dedup = dedup

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Consume the unit; nothing is passed on."""
        self.begin()
        self._directory.mkdir(parents=True, exist_ok=True)
        minhash = MinHash(self._dedup.bands, self._dedup.rows, self._dedup.seed)
        pieces = PieceTable(self._dedup, minhash)
        sizes, digests, bands, sampled, ends = [], [], [], [], []
        path = self._directory / f"{unit_name(rank)}.jsonl"
        with path.open("wb") as stream:
            for item in data:
                self._tally.read(item)
                if item.out is not None:
                    self.leave(item, rank)
                    continue
                with self.track_time():
                    sizes.append(stream.write(to_line(item)))
                    measures = item.measures or Measures(item.text)
                    pieces.add(len(digests), measures)
                    marks = self._marks(measures, minhash)
                    digests.append(marks[0])
                    bands.append(marks[1])
                    sampled.append(marks[2])
                    ends.append((ends[-1] if ends else 0) + len(marks[2]))
        save_arrays(
            self._directory / f"{unit_name(rank)}.npz",
            sizes=np.array(sizes, dtype=np.uint32),
            digests=np.array(digests, dtype=np.uint64).reshape(-1, 2),
            bands=np.array(bands, dtype=np.uint32).reshape(-1, self._dedup.bands),
            sampled=np.concatenate(sampled) if sampled else np.zeros(0, dtype=np.uint64),
            sampled_ends=np.array(ends if self._dedup.containment else [], dtype=np.int64),
        )
        if self._dedup.pieces != "none":
            pieces.save(pieces_path(self._directory, rank))
        self.finish(rank)
        yield from ()

    def _marks(
        self, measures: Measures, minhash: MinHash
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Digest, bands and sampled shingles of a text; one without words is its own bytes."""
        hashes = measures.words.hashes
        content = (
            hashes.tobytes() if len(hashes) else measures.text.encode("utf-8", "surrogatepass")
        )
        digest = hashlib.blake2b(content, digest_size=16).digest()
        pair = np.frombuffer(digest, dtype="<u8")
        if not self._dedup.near and not self._dedup.containment:
            return pair, np.zeros(self._dedup.bands, np.uint32), np.zeros(0, np.uint64)
        elements = shingles(hashes, self._dedup.shingle_words)
        if not len(elements):
            elements = pair[:1]
        chosen = np.zeros(0, dtype=np.uint64)
        if self._dedup.containment:
            chosen = np.unique(elements[elements % np.uint64(SAMPLED) == 0])
        return pair, minhash.bands(elements), chosen


class WriteClean(_Sink):
    """Ends the run: the documents without duplicates, in the order of the input."""

    name = "clean documents"

    def __init__(
        self,
        output: OutputConfig,
        directory: Path,
        indexed: Path,
        found: Path,
        cuts: Path | None = None,
    ) -> None:
        """directory: for the counts; indexed: WriteIndexed's; found: what to drop, by document.

        cuts: FindPieces', where parts of documents go too.
        """
        super().__init__(output, directory, "corpus_")
        self._clean = writer(output, CLEAN)
        self._indexed, self._found, self._cuts = indexed, found, cuts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Read unit number `rank` again and write what stays."""
        self.begin()
        name = unit_name(rank)
        removed = orjson.loads((self._found / f"{name}.json").read_bytes())
        cuts = read_json(cuts_path(self._cuts, rank)) if self._cuts else {}
        with (self._indexed / f"{name}.jsonl").open("rb") as stream:
            for number, line in enumerate(stream):
                item = from_line(line)
                if str(number) in cuts:
                    cut(item, cuts[str(number)])
                why = removed.get(str(number))
                if why is not None:
                    item.drop(**why)
                    self.leave(item, rank)
                    continue
                self._clean.write(item, rank)
                self._tally.kept(item, len(item.text.encode("utf-8", "surrogatepass")))
        self._clean.close()
        self.finish(rank)
        yield from ()
