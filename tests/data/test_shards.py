"""Shards: what is written is read back, whole or not at all, and damage is noticed."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_cases import numbered
from hypothesis import given, settings
from hypothesis import strategies as st

from transnormer.data import ByteTokenizer, Document, Tokenizer, TokenSource, write_shards
from transnormer.data.tokenizers import TiktokenTokenizer

BYTES = ByteTokenizer()


def stream_of(documents: list[Document]) -> list[int]:
    """The tokens that these documents must become."""
    return [token for d in documents for token in [*BYTES.encode(d.text), BYTES.eos_id]]


def test_tokens_come_back_across_shards(source: TokenSource) -> None:
    documents = list(numbered([7, 20, 1, 18, 9]))
    assert len(source.manifest.shards) == 2
    assert source.tokens(0, len(source)).tolist() == stream_of(documents)
    assert source.tokens(27, 35).tolist() == stream_of(documents)[27:35]
    assert source.document_ends.tolist() == [8, 29, 31, 50, 60]
    assert (len(source), source.num_documents, source.num_bytes) == (60, 5, 55)


def test_documents_come_back_with_id_bytes_and_tokens(source: TokenSource) -> None:
    for document, (name, size, tokens) in zip(
        numbered([7, 20, 1, 18, 9]), source.documents(), strict=True
    ):
        assert name == document.id
        assert size == len(document.text)
        assert tokens.tolist() == stream_of([document])


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(max_size=12), min_size=1, max_size=6).filter(any),
    shard_tokens=st.integers(1, 40),
)
def test_any_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], shard_tokens: int
) -> None:
    documents = [Document(str(place), text) for place, text in enumerate(texts)]
    directory = tmp_path_factory.mktemp("shards") / "out"
    write_shards(documents, BYTES, directory, shard_tokens=shard_tokens)
    source = TokenSource(directory)
    kept = [document for document in documents if document.text]
    assert source.tokens(0, len(source)).tolist() == stream_of(kept)
    assert source.num_bytes == sum(len(document.text.encode()) for document in kept)


def test_ids_are_little_endian_of_the_smallest_size(tmp_path: Path) -> None:
    ranks = {bytes([b]): b for b in range(256)}
    for name, eos, dtype in (("small", 65535, "<u2"), ("large", 65536, "<u4")):
        tokenizer = TiktokenTokenizer(ranks, r"[\s\S]", {"<|endoftext|>": eos})
        manifest = write_shards([Document("d", "ab")], tokenizer, tmp_path / name)
        assert manifest.dtype == {"<u2": "uint16", "<u4": "uint32"}[dtype]
        raw = np.frombuffer((tmp_path / name / "shard_00000.bin").read_bytes(), dtype=dtype)
        assert raw.tolist() == [97, 98, eos]


def test_the_manifest_counts_text_bytes_without_a_tokenizers_prefix(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = [Document("a", "the text"), Document("b", "线性")]
    manifest = write_shards(documents, tokenizer, tmp_path / "out", source="here")
    assert manifest.num_bytes == 8 + 6
    assert manifest.source == "here"
    source = TokenSource(tmp_path / "out")
    source.check_tokenizer(tokenizer)
    assert [tokenizer.decode(tokens) for _, _, tokens in source.documents()] == [
        "the text",
        "线性",
    ]


def test_another_tokenizer_is_noticed(source: TokenSource) -> None:
    other = TiktokenTokenizer({bytes([b]): b for b in range(256)}, r"[\s\S]", {"</s>": 258})
    with pytest.raises(ValueError, match="was made with tokenizer .*tokenise the text again"):
        source.check_tokenizer(other)


def test_another_start_token_is_noticed(source: TokenSource) -> None:
    path = source.directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"start_id": 3}))
    with pytest.raises(ValueError, match="begins documents with token 3; expected 257"):
        TokenSource(source.directory).check_tokenizer(BYTES)


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    def failing() -> Iterator[Document]:
        yield Document("a", "text")
        raise OSError(errno.EIO, "the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_shards(failing(), BYTES, tmp_path / "out", shard_tokens=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_write_to_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_shards([Document("a", "text")], BYTES, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten(source: TokenSource) -> None:
    with pytest.raises(FileExistsError, match="exists; expected a new directory"):
        write_shards([Document("a", "text")], BYTES, source.directory)
    assert len(TokenSource(source.directory)) == 60


def damage(path: Path, how: str) -> None:
    """Damage a file in one of four ways."""
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"x")
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["removed", "truncated", "longer", "changed"])
@pytest.mark.parametrize(
    "name", ["shard_00000.bin", "shard_00001.bin", "shard_00000.idx.npy", "shard_00001.docs.jsonl"]
)
def test_a_damaged_file_is_named(name: str, how: str, source: TokenSource) -> None:
    damage(source.directory / name, how)
    with pytest.raises(ValueError, match=rf"{name} .*; tokenise the text again"):
        TokenSource(source.directory)


@pytest.mark.parametrize("how", ["removed", "truncated", "longer"])
def test_a_cut_token_file_is_noticed_without_hashing(how: str, source: TokenSource) -> None:
    damage(source.directory / "shard_00000.bin", how)
    with pytest.raises(ValueError, match=r"shard_00000\.bin"):
        TokenSource(source.directory, verify=False)


@pytest.mark.parametrize(
    "ends",
    [[29], [29, 29], [8, 30], [[8], [29]], [8.0, 29.0]],
    ids=["too-few", "not-rising", "beyond-the-end", "rank-2", "floats"],
)
def test_an_index_that_disagrees_is_noticed_without_hashing(
    ends: list[int], source: TokenSource
) -> None:
    np.save(source.directory / "shard_00000.idx.npy", np.array(ends).astype(dtype_of(ends)))
    with pytest.raises(ValueError, match=r"idx\.npy does not agree with the manifest"):
        TokenSource(source.directory, verify=False)


def dtype_of(ends: list[int]) -> str:
    """The index's dtype for integers, float64 for others."""
    return "<f8" if isinstance(ends[0], float) else "<u8"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_tokens", 61, "manifest.json says num_tokens 61, its shards 60"),
        ("num_bytes", 1, "manifest.json says num_bytes 1"),
        ("start_id", 259, "manifest.json says start_id 259 of a vocabulary of 259"),
        ("start_id", -1, "manifest.json says start_id -1"),
        ("eos_id", 259, "manifest.json says eos_id 259 of a vocabulary of 259"),
        ("dtype", "int8", "dtype is 'int8'; expected"),
        ("format", "other", "format is 'other'; expected"),
        ("extra", 1, "extra is an unknown key"),
    ],
)
def test_a_changed_manifest_is_noticed(
    field: str, value: object, message: str, source: TokenSource
) -> None:
    path = source.directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        TokenSource(source.directory)


@pytest.mark.parametrize("content", ["", "[]", "{", "\udcff"])
def test_a_manifest_that_is_no_table_is_noticed(content: str, source: TokenSource) -> None:
    path = source.directory / "manifest.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest\.json (is not|holds a list)"):
        TokenSource(source.directory)
