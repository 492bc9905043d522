"""Tokenised corpora on disk: flat files of ids, an index of documents, a manifest with hashes.

A directory holds, for each shard N of five digits,

    shard_N.bin          ids, little-endian uint16 (vocabularies up to 65,536) or uint32
    shard_N.idx.npy      uint64 [documents]: where each document ends, counted from the shard's start
    shard_N.docs.jsonl   for each document its id and the UTF-8 bytes of its text

and manifest.json. A document is its text's tokens and then the end-of-text token. Documents are
never cut between shards.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from transnormer.config import Config, validate
from transnormer.data.document import Document
from transnormer.data.tokenizers.base import Tokenizer, start_id
from transnormer.files import atomic_directory, read_json, sha256, write_synced

MANIFEST = "manifest.json"
FORMAT = "transnormer-shards-1"
_UINT16_IDS = 1 << 16
# Texts are tokenised in groups of about this many characters, so that memory stays flat.
_GROUP_CHARACTERS = 1 << 21
_GROUP_TEXTS = 1024


class Shard(Config):
    """One shard: how much is in it and the sha256 of its three files."""

    name: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    sha256_bin: str
    sha256_idx: str
    sha256_docs: str


class Manifest(Config):
    """What a directory of shards holds.

    num_tokens counts end-of-text tokens too, num_bytes the UTF-8 bytes of the text alone. start_id
    is what stands before a document's first token; it is not stored with the tokens.
    """

    format: Literal["transnormer-shards-1"] = FORMAT
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    eos_id: int
    start_id: int
    tokenizer_fingerprint: str
    source: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    shards: tuple[Shard, ...]


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    source: str = "",
    shard_tokens: int = 1 << 27,
) -> Manifest:
    """Tokenise documents into a new directory, which appears when it is complete.

    Args:
        documents: what to write; empty texts are left out.
        tokenizer: needs an end-of-text token.
        directory: must not exist yet, or be empty.
        source: where the documents came from, for the manifest.
        shard_tokens: a shard is closed at the first document that ends at or beyond this size.

    Raises ValueError for a corpus without text and a tokenizer without eos; FileExistsError.
    """
    if tokenizer.eos_id is None:
        raise ValueError("tokenizer has no end-of-text token; expected one; add one to its file")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; expected at least 1")
    dtype: Literal["uint16", "uint32"] = (
        "uint16" if tokenizer.vocab_size <= _UINT16_IDS else "uint32"
    )
    shards: list[Shard] = []
    with atomic_directory(Path(directory)) as temporary:
        writer = _ShardWriter(temporary, dtype)
        for document, ids in _tokenised(documents, tokenizer):
            writer.add(document, [*ids, tokenizer.eos_id])
            if writer.num_tokens >= shard_tokens:
                shards.append(writer.close())
                writer = _ShardWriter(temporary, dtype, number=len(shards))
        if writer.num_tokens:
            shards.append(writer.close())
        if not shards:
            raise ValueError(f"source {source!r} holds no text; expected some documents")
        manifest = Manifest(
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            start_id=start_id(tokenizer),
            tokenizer_fingerprint=tokenizer.fingerprint,
            source=source,
            num_tokens=sum(shard.num_tokens for shard in shards),
            num_documents=sum(shard.num_documents for shard in shards),
            num_bytes=sum(shard.num_bytes for shard in shards),
            shards=tuple(shards),
        )
        write_synced(temporary / MANIFEST, manifest.model_dump_json(indent=2).encode("utf-8"))
    return manifest


def _tokenised(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, list[int]]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        if document.text:
            group.append(document)
            characters += len(document.text)
        if characters >= _GROUP_CHARACTERS or len(group) >= _GROUP_TEXTS:
            yield from zip(group, _encode(group, tokenizer), strict=True)
            group, characters = [], 0
    if group:
        yield from zip(group, _encode(group, tokenizer), strict=True)


def _encode(group: list[Document], tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return tokenizer.encode_batch([document.text for document in group])
    except ValueError:
        # Once more one by one, to name the document.
        for document in group:
            try:
                tokenizer.encode(document.text)
            except ValueError as error:
                raise ValueError(f"document {document.id}: {error}") from error
        raise


class _ShardWriter:
    """Collects one shard in memory and writes its three files."""

    def __init__(self, directory: Path, dtype: str, *, number: int = 0) -> None:
        self._directory = directory
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._name = f"shard_{number:05d}"
        self._tokens: list[np.ndarray] = []
        self._ends: list[int] = []
        self._documents: list[dict[str, Any]] = []
        self.num_tokens = 0

    def add(self, document: Document, ids: list[int]) -> None:
        self._tokens.append(np.array(ids, dtype=self._dtype))
        self.num_tokens += len(ids)
        self._ends.append(self.num_tokens)
        self._documents.append({"id": document.id, "bytes": len(document.text.encode("utf-8"))})

    def close(self) -> Shard:
        tokens = np.concatenate(self._tokens)
        paths = _shard_paths(self._directory, self._name)
        write_synced(paths["bin"], tokens.tobytes())
        with paths["idx"].open("wb") as stream:
            np.save(stream, np.array(self._ends, dtype="<u8"))
        lines = [json.dumps(entry) + "\n" for entry in self._documents]
        write_synced(paths["docs"], "".join(lines).encode("utf-8"))
        return Shard(
            name=self._name,
            num_tokens=self.num_tokens,
            num_documents=len(self._ends),
            num_bytes=sum(entry["bytes"] for entry in self._documents),
            sha256_bin=sha256(paths["bin"]),
            sha256_idx=sha256(paths["idx"]),
            sha256_docs=sha256(paths["docs"]),
        )


class TokenSource:
    """A directory of shards, read through memory maps as one stream of tokens.

    Attributes:
        manifest: the manifest.
        document_ends: int64 [num_documents], where each document ends in the stream, its
            end-of-text token included.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        """Open a directory that write_shards made.

        Args:
            directory: where manifest.json is.
            verify: also compare the sha256 of every file, which reads all of it. Sizes and counts
                are compared in any case.

        Raises FileNotFoundError without a manifest, ValueError that names the file where one is
        missing, cut, changed or does not agree with the manifest.
        """
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self._arrays: list[np.ndarray] = []
        starts, ends = [0], []
        for shard in self.manifest.shards:
            tokens, shard_ends = _open_shard(self.directory, shard, self.manifest.dtype, verify)
            self._arrays.append(tokens)
            ends.append(shard_ends + starts[-1])
            starts.append(starts[-1] + shard.num_tokens)
        self._starts = np.array(starts, dtype=np.int64)
        self.document_ends = np.concatenate(ends)

    def __len__(self) -> int:
        """Number of tokens, end-of-text tokens included."""
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.manifest.num_documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return self.manifest.num_bytes

    @property
    def name(self) -> str:
        """What messages call this source: where its documents came from."""
        return self.manifest.source or str(self.directory)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start to stop of the stream, int64 [stop - start]."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(
                f"tokens {start} to {stop} are asked of {self.name}; expected 0 to {len(self)}"
            )
        result = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < stop:
            offset = at - int(self._starts[shard])
            count = min(stop - at, int(self._starts[shard + 1]) - at)
            result[at - start : at - start + count] = self._arrays[shard][offset : offset + count]
            at += count
            shard += 1
        return result

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, its end-of-text token included, int64."""
        if not 0 <= index < self.num_documents:
            raise ValueError(f"document is {index}; expected 0 to {self.num_documents - 1}")
        start = int(self.document_ends[index - 1]) if index else 0
        return self.tokens(start, int(self.document_ends[index]))

    def documents(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield (id, UTF-8 bytes, tokens with the end-of-text token) of every document."""
        index = 0
        for shard in self.manifest.shards:
            path = _shard_paths(self.directory, shard.name)["docs"]
            with path.open(encoding="utf-8") as stream:
                for line in stream:
                    entry = json.loads(line)
                    yield entry["id"], entry["bytes"], self.document(index)
                    index += 1

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError unless the shards were made with this tokenizer."""
        if tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise ValueError(
                f"{self.directory} was made with tokenizer "
                f"{self.manifest.tokenizer_fingerprint[:12]}; expected "
                f"{tokenizer.fingerprint[:12]}; tokenise the text again"
            )
        if self.manifest.start_id != start_id(tokenizer):
            raise ValueError(
                f"{self.directory} begins documents with token {self.manifest.start_id}; expected "
                f"{start_id(tokenizer)}, as its tokenizer does; tokenise the text again"
            )


def _shard_paths(directory: Path, name: str) -> dict[str, Path]:
    suffixes = {"bin": ".bin", "idx": ".idx.npy", "docs": ".docs.jsonl"}
    return {kind: directory / f"{name}{suffix}" for kind, suffix in suffixes.items()}


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; expected a directory that transnormer tokenize made; make it again"
        )
    manifest = validate(Manifest, read_json(path), source=str(path))
    for field in ("start_id", "eos_id"):
        if not 0 <= getattr(manifest, field) < manifest.vocab_size:
            raise _corrupt(
                path,
                f"says {field} {getattr(manifest, field)} of a vocabulary of {manifest.vocab_size}",
            )
    for field in ("num_tokens", "num_documents", "num_bytes"):
        total = sum(getattr(shard, field) for shard in manifest.shards)
        if total != getattr(manifest, field):
            raise _corrupt(path, f"says {field} {getattr(manifest, field)}, its shards {total}")
    return manifest


def _open_shard(
    directory: Path, shard: Shard, dtype: str, verify: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shard's tokens (a memory map) and its document ends, int64."""
    paths = _shard_paths(directory, shard.name)
    for path in paths.values():
        if not path.is_file():
            raise _corrupt(path, "is missing")
    kind = np.dtype(dtype).newbyteorder("<")
    size, expected = paths["bin"].stat().st_size, shard.num_tokens * kind.itemsize
    if size != expected:
        raise _corrupt(paths["bin"], f"has {size} bytes, not {expected}")
    if verify:
        for which, path in paths.items():
            if sha256(path) != getattr(shard, f"sha256_{which}"):
                raise _corrupt(path, "has changed: its sha256 differs")
    try:
        ends = np.load(paths["idx"], allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _corrupt(paths["idx"], f"cannot be read ({error})") from None
    good = ends.ndim == 1 and ends.dtype == np.dtype("<u8") and len(ends) == shard.num_documents
    if (
        not good
        or not len(ends)
        or int(ends[-1]) != shard.num_tokens
        or np.any(ends[1:] <= ends[:-1])
    ):
        raise _corrupt(paths["idx"], "does not agree with the manifest")
    return np.memmap(paths["bin"], dtype=kind, mode="r"), ends.astype(np.int64)


def _corrupt(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} {what}; expected the file as it was written; tokenise the text again"
    )
