"""Reading documents: .txt, .md and .jsonl files, plain or compressed, from paths and globs."""

import glob
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from transnormer.data.document import Document
from transnormer.data.embedded import embedded_documents
from transnormer.files import COMPRESSED_SUFFIXES, open_file

EMBEDDED = "embedded"
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
_BOM = b"\xef\xbb\xbf"


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
    with open_file(path) as stream:
        yield from _json_lines(stream, path)


def _read_file(path: Path) -> Iterator[Document]:
    with open_file(path) as stream:
        if _kind(path) == ".jsonl":
            yield from _read_lines(stream, path)
        else:
            yield Document(str(path), _decode(stream.read(), str(path)))


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
