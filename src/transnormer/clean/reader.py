"""Reading untrusted files as items: what is broken is named and passed on, nothing is held whole.

A line, file or record longer than the limit is read in blocks and thrown away, so that memory stays
flat for a line of a gigabyte and for an archive that unpacks to one.
"""

import importlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson
from datatrove.pipeline.base import PipelineStep

from transnormer.clean.config import InputConfig
from transnormer.clean.item import Item, quarantined
from transnormer.clean.units import LINES, TABLE, TEXT, TURN, WARC, Unit
from transnormer.files import open_file

_BLOCK = 1 << 20
_BATCH_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"


class ReadUnit(PipelineStep):
    """Yields the items of the unit that has the task's number."""

    type = "read"
    name = "units"

    def __init__(self, units: list[Unit], config: InputConfig) -> None:
        super().__init__()
        self._units, self._config = units, config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Read unit number `rank`; raises OSError where the file is gone or cannot be read."""
        unit = self._units[rank]
        items = _READERS[unit.kind](unit, self._config)
        number = -1
        try:
            for number, item in enumerate(items):
                if number // TURN % unit.shares == unit.share:
                    yield item
        except (ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
            # What came before the damage is good; the share whose turn it is tells of it.
            if (number + 1) // TURN % unit.shares == unit.share:
                place = f"{unit.path}:{number + 2}"
                yield quarantined(place, unit.path, number + 2, f"damaged: {error}")


def bounded_lines(stream: IO[bytes], limit: int, size: int | None = None) -> Iterator[bytes | None]:
    """Yield the lines of a stream without their ends; None for one longer than limit.

    Args:
        stream: read in blocks of a megabyte.
        limit: bytes.
        size: lines that begin at or beyond this many bytes from here are left; None reads all.
    """
    rest, skipping, at = b"", False, 0
    while block := stream.read(_BLOCK):
        pieces = (rest + block).split(b"\n")
        rest = pieces.pop()
        for piece in pieces:
            if skipping:
                # The tail of a line that was too long; its head has been counted.
                at += len(piece) + 1
                skipping = False
                yield None
            else:
                yield None if len(piece) > limit else piece
                at += len(piece) + 1
            if size is not None and at >= size:
                return
        if len(rest) > limit:
            at += len(rest)
            rest, skipping = b"", True
    if skipping or rest:
        yield None if skipping or len(rest) > limit else rest


def _read_lines(unit: Unit, config: InputConfig) -> Iterator[Item]:
    path = unit.path
    with open_file(Path(path)) as stream:
        number, size = unit.lines, None
        if unit.start:
            number += _skip_head(stream, unit)
        if Path(path).suffix.lower() == ".jsonl":
            size = unit.end - stream.tell()
            if size <= 0:
                return
        for line in bounded_lines(stream, config.max_document_bytes, size):
            number += 1
            if line is None:
                reason = f"a line of more than {config.max_document_bytes} bytes"
                yield quarantined(f"{path}:{number}", path, number, reason)
            elif line.strip():
                yield _from_line(line, path, number, config)


def _skip_head(stream: IO[bytes], unit: Unit) -> int:
    """Go to the first line that begins in the unit, or beyond it; returns the lines passed."""
    stream.seek(unit.start - 1)
    while stream.tell() < unit.end and (block := stream.read(_BLOCK)):
        end = block.find(b"\n")
        if end >= 0:
            stream.seek(end + 1 - len(block), 1)
            # The line that ends just before the unit is counted already.
            return int(stream.tell() > unit.start)
    return 0


def _from_line(line: bytes, path: str, number: int, config: InputConfig) -> Item:
    place = f"{path}:{number}"

    def bad(reason: str) -> Item:
        return quarantined(place, path, number, reason)

    try:
        text_line = line.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        return bad(f"not UTF-8 at byte {error.start}")
    try:
        record = orjson.loads(text_line)
    except orjson.JSONDecodeError as error:
        return bad(f"not JSON: {error}")
    if not isinstance(record, dict):
        return bad("no object")
    return _from_record(record, place, bad, config)


def _from_record(record: dict[str, Any], place: str, bad: Any, config: InputConfig) -> Item:
    text = record.pop(config.text_field, None)
    name = record.pop(config.id_field, None)
    if not isinstance(text, str):
        return bad(f"no text in field {config.text_field!r}")
    known = isinstance(name, str | int) and not isinstance(name, bool)
    return Item(
        text=text,
        id=str(name) if known else place,
        metadata=record,
        read_bytes=len(text.encode("utf-8", "surrogatepass")),
    )


def _from_bytes(data: bytes, path: str, number: int, name: str) -> Item:
    try:
        text = data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        return quarantined(name, path, number, f"not UTF-8 at byte {error.start}")
    return Item(text=text, id=name, read_bytes=len(data))


def _read_text(unit: Unit, config: InputConfig) -> Iterator[Item]:
    limit = config.max_document_bytes
    with open_file(Path(unit.path)) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        yield quarantined(unit.path, unit.path, 1, f"a file of more than {limit} bytes")
    else:
        yield _from_bytes(data, unit.path, 1, unit.path)


def _read_warc(unit: Unit, config: InputConfig) -> Iterator[Item]:
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    limit = config.max_document_bytes
    # warcio unpacks .gz itself, record by record.
    with Path(unit.path).open("rb") as stream:
        try:
            for number, record in enumerate(ArchiveIterator(stream), start=1):
                if record.rec_type not in ("response", "conversion", "resource"):
                    continue
                kind = record.http_headers and record.http_headers.get_header("Content-Type")
                if kind and "html" not in kind and "text" not in kind:
                    continue
                place = record.rec_headers.get_header("WARC-Record-ID") or f"{unit.path}:{number}"
                data = record.content_stream().read(limit + 1)
                if len(data) > limit:
                    reason = f"a record of more than {limit} bytes"
                    yield quarantined(place, unit.path, number, reason)
                    continue
                item = _from_bytes(data, unit.path, number, place)
                item.metadata["url"] = record.rec_headers.get_header("WARC-Target-URI")
                yield item
        except ArchiveLoadFailed as error:
            raise ValueError(str(error)) from error


def _read_table(unit: Unit, config: InputConfig) -> Iterator[Item]:
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    # A value that many rows share is unpacked for each row of a batch.
    rows = max(1, min(TURN, _BATCH_BYTES // config.max_document_bytes))
    number = 0
    try:
        with parquet.ParquetFile(unit.path) as table:
            for group in range(table.num_row_groups):
                facts = table.metadata.row_group(group)
                if facts.total_byte_size > facts.num_rows * config.max_document_bytes:
                    # A page is unpacked whole, before anything can be known of its rows.
                    reason = f"rows of more than {config.max_document_bytes} bytes on average"
                    yield quarantined(f"{unit.path}:{number + 1}", unit.path, number + 1, reason)
                    number += facts.num_rows
                    continue
                for batch in table.iter_batches(batch_size=rows, row_groups=[group]):
                    for record in batch.to_pylist():
                        number += 1
                        yield _from_row(record, unit.path, number, config)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(str(error)) from error


def _from_row(record: dict[str, Any], path: str, number: int, config: InputConfig) -> Item:
    place, limit = f"{path}:{number}", config.max_document_bytes

    def bad(reason: str) -> Item:
        return quarantined(place, path, number, reason)

    item = _from_record(record, place, bad, config)
    return bad(f"a row of more than {limit} bytes") if item.read_bytes > limit else item


_READERS = {LINES: _read_lines, TEXT: _read_text, WARC: _read_warc, TABLE: _read_table}
