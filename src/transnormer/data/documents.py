"""Reading documents: .txt, .md and .jsonl files, plain or compressed, from paths and globs."""

import glob
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from transnormer.data.document import Document
from transnormer.data.embedded import embedded_documents

EMBEDDED = "embedded"
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
COMPRESSED_SUFFIXES = (".xz", ".gz", ".zst")
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20


def read_documents(
    pattern: str, *, name: str = "data.path", without: Collection[Path] = ()
) -> Iterator[Document]:
    """Yield the documents of a file, a directory, a glob, or of the corpus named "embedded".

    A .txt or .md file is one document, each line of a .jsonl file another: an object whose "text"
    is the text and whose optional "id" the name. Any of them may end in .xz, .gz or .zst as well.
    Directories are read with all below them, files in the order of their names; they and globs
    take files of these kinds, while a file that is named itself is plain text whatever else its
    name ends in. Text is kept as it is, line ends included; a byte order mark at the head of a file
    is dropped, and so are empty documents.

    Args:
        pattern: a file, a directory, a glob, or "embedded".
        name: what messages call the pattern.
        without: files to leave out, as resolved paths.

    Raises FileNotFoundError where nothing matches, RuntimeError for .zst without zstandard, and
    ValueError that names the file (and the line) for bad UTF-8, bad JSON, a damaged
    archive, and for a corpus without any text.
    """
    if pattern == EMBEDDED:
        yield from embedded_documents("train")
        yield from embedded_documents("heldout")
        return
    empty = True
    for path in find_files(pattern, name=name):
        if path.resolve() in without:
            continue
        for document in _read_file(path):
            if document.text:
                empty = False
                yield document
    if empty:
        what = "no text beside the held-out one" if without else "no text"
        raise ValueError(f"{name} is {pattern!r}, which holds {what}; expected some text")


def find_files(pattern: str, *, name: str = "data.path") -> list[Path]:
    """Return the files that a path, directory or glob means, sorted by name."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    elif glob.has_magic(pattern):
        inside = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    else:
        raise FileNotFoundError(
            f"{name} is {pattern!r}; expected a file, a directory, a glob that matches files or "
            f"{EMBEDDED!r}; check the path"
        )
    files = [p for p in inside if _kind(p) is not None]
    if not files:
        raise FileNotFoundError(
            f"{name} is {pattern!r}, which holds no {', '.join(TEXT_SUFFIXES)} file; expected "
            "at least one; check the path"
        )
    return files


def _kind(path: Path) -> str | None:
    """Return .txt, .md or .jsonl, None for other files; the case of the letters is ignored."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT_SUFFIXES else None


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", value) of every line of a file of JSON lines that is not blank.

    Raises ValueError that names file and line for bad UTF-8, bad JSON and a damaged archive,
    RuntimeError for .zst without zstandard.
    """
    with _opened(path) as stream:
        yield from _json_lines(stream, path)


def _read_file(path: Path) -> Iterator[Document]:
    with _opened(path) as stream:
        if _kind(path) == ".jsonl":
            yield from _read_lines(stream, path)
        else:
            yield Document(str(path), _decode(stream.read(), str(path)))


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked; a damaged archive is a ValueError of one line."""
    try:
        with _open(path) as stream:
            yield stream
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; expected a whole {path.suffix} file; fetch it again"
        ) from error


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"))
    if suffix == ".zst":
        return _open_zst(path)
    return path.open("rb")


def _open_zst(path: Path) -> IO[bytes]:
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{path} needs zstandard; run: pip install 'transnormer[zstd]'"
        ) from error
    return io.BufferedReader(_ZstReader(zstandard, path))


class _ZstReader(io.RawIOBase):
    """A .zst file as a stream of bytes; a file that ends within a frame raises EOFError."""

    def __init__(self, zstandard: Any, path: Path) -> None:
        self._zstandard = zstandard
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor().decompressobj()
        self._input = self._output = b""
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._input or self._file.read(_BLOCK)
            self._input = b""
            if not data:
                if self._inside:
                    raise EOFError("it ends within a frame")
                return 0
            try:
                self._output = self._decompressor.decompress(data)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._inside = not self._decompressor.eof
            if self._decompressor.eof:
                self._input = self._decompressor.unused_data
                self._decompressor = self._zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _decode(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at {error.start}; expected UTF-8 "
            "text; convert the file"
        ) from None


def _json_lines(stream: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
        where = f"{path}:{number}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            # A number of more digits than Python converts is a ValueError of another kind.
            raise ValueError(
                f"{where} is not JSON: {error}; expected one object on each line"
            ) from None
        yield where, record


def _read_lines(stream: IO[bytes], path: Path) -> Iterator[Document]:
    for where, record in _json_lines(stream, path):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(
                f'{where} has no text; expected an object with a string "text" on each line'
            )
        if any("\ud800" <= char <= "\udfff" for char in record["text"]):
            raise ValueError(
                f"{where} holds a lone surrogate; expected text that UTF-8 can hold; remove it"
            )
        name = record.get("id")
        yield Document(str(name) if isinstance(name, str | int) else where, record["text"])
