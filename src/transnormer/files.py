"""Files and directories that a reader sees whole or not at all; archives, hashes, JSON objects."""

import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

COMPRESSED_SUFFIXES = (".xz", ".gz", ".zst")
# Four bytes of zstd may say 128 kB, and what a block says is in memory at once: 32 MB.
_ZST_BLOCK = 1 << 10
_XZ_BLOCK = 1 << 16
# What unpacking .xz may take: `xz -9` wants 65 MiB, a header may ask for 4 GiB.
_XZ_BYTES = 192 << 20


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Let an OSError of this block name the file; those of a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with naming(path), path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Write or replace a file; a reader sees the old bytes or the new ones, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files that only their owner may read.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `path` when the block ends without an error.

    An error removes it, so `path` never exists half written. Raises FileExistsError where `path`
    exists and is not an empty directory.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists; expected a new directory; delete it or choose another"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises FileNotFoundError, or a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected JSON; check the path")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON: {error}; expected an object; the file may be damaged"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object; it is on the disk when this returns."""
    write_synced(path, (json.dumps(data, indent=2) + "\n").encode())


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
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
        return io.BufferedReader(_XzReader(path), _XZ_BLOCK)
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


class _XzReader(io.RawIOBase):
    """A .xz file as a stream of bytes, in bounded memory; a cut one raises EOFError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_BYTES)
        # At least one stream is there.
        self._inside = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._decompressor.eof:
                data = self._decompressor.unused_data
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_BYTES)
                self._inside = False
            if not data and self._decompressor.needs_input:
                data = self._file.read(_XZ_BLOCK)
                if not data:
                    if self._inside:
                        raise EOFError("it ends within a stream")
                    return 0
            if not self._inside:
                # Zeros may stand between streams and behind the last one.
                data = data.lstrip(b"\0")
                if not data:
                    continue
            self._inside = True
            found = self._decompressor.decompress(data, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstReader(io.RawIOBase):
    """A .zst file as a stream of bytes; a file that ends within a frame raises EOFError."""

    def __init__(self, zstandard: Any, path: Path) -> None:
        self._zstandard = zstandard
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor().decompressobj()
        self._input = self._output = b""
        self._at = 0
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._at == len(self._output):
            data = self._input or self._file.read(_ZST_BLOCK)
            self._input = b""
            if not data:
                if self._inside:
                    raise EOFError("it ends within a frame")
                return 0
            try:
                self._output, self._at = self._decompressor.decompress(data), 0
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._inside = not self._decompressor.eof
            if self._decompressor.eof:
                self._input = self._decompressor.unused_data
                self._decompressor = self._zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._output) - self._at)
        buffer[:count] = self._output[self._at : self._at + count]
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
