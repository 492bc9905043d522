"""Reading documents: every kind of file, every way to name them."""

import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from transnormer.data import Document, embedded_documents, read_documents

PACK = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", [".txt", ".md"])
def test_a_text_file_is_one_document(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(PACK[suffix]("one\r\ntwo 的\n".encode()))
    assert list(read_documents(str(path))) == [Document(str(path), "one\r\ntwo 的\n")]


@pytest.mark.parametrize("suffix", PACK)
def test_a_jsonl_file_is_a_document_a_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    lines = ['{"text": "first", "id": "x"}', "", '{"text": "sec\\nond", "id": 7, "more": [1]}']
    lines.append('{"text": "third"}')
    path.write_bytes(PACK[suffix]("\n".join(lines).encode()))
    documents = list(read_documents(str(path)))
    assert documents == [("x", "first"), ("7", "sec\nond"), (f"{path}:4", "third")]


def test_several_zst_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    big = "\n".join(str(number) for number in range(400_000))
    path.write_bytes(PACK[".zst"](b"first ") + PACK[".zst"](big.encode()))
    assert [document.text for document in read_documents(str(path))] == ["first " + big]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4))
def test_any_text_survives_a_jsonl_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    assert [document.text for document in read_documents(str(path))] == texts


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three texts, one of them deeper, and two files that are no text."""
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.md", "deep/c.txt", "ignored.bin", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_a_directory_is_read_with_all_below_in_order(tree: Path) -> None:
    assert [d.text for d in read_documents(str(tree))] == ["a.md", "b.txt", "deep/c.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["b.txt"]),
        ("**/*.txt", ["b.txt", "deep/c.txt"]),
        ("[ab].*", ["a.md", "b.txt"]),
        ("*", ["a.md", "b.txt"]),
    ],
)
def test_a_glob_is_read_in_order(pattern: str, expected: list[str], tree: Path) -> None:
    assert [d.text for d in read_documents(str(tree / pattern))] == expected


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("text")
    assert [d.text for d in read_documents(str(tmp_path / "a[1].txt"))] == ["text"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}')
    assert [d.text for d in read_documents(str(tmp_path))] == ["text", "line"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}')
    assert [d.text for d in read_documents(str(tmp_path))] == ["x"]


def test_embedded_is_both_parts_of_the_default_corpus() -> None:
    expected = embedded_documents("train") + embedded_documents("heldout")
    assert list(read_documents("embedded")) == expected


def test_zst_without_its_package_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt.zst").write_bytes(PACK[".zst"](b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(RuntimeError, match=r"run: pip install 'transnormer\[zstd\]'"):
        list(read_documents(str(tmp_path)))


@pytest.mark.parametrize("name", ["NOTES", "corpus.text", "a.csv", "b.rst.gz"])
def test_a_named_file_is_text_whatever_its_name_ends_in(name: str, tmp_path: Path) -> None:
    content = b"some text\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [d.text for d in read_documents(str(tmp_path / name))] == ["some text\n"]
    with pytest.raises(FileNotFoundError, match="expected at least one"):
        list(read_documents(str(tmp_path)))
