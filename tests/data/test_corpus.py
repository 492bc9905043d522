"""The cut of a corpus into a training part and a held-out part."""

import json
from pathlib import Path

import pytest

from transnormer.data import Corpus, embedded_documents


def write_lines(path: Path, names: range) -> str:
    """A .jsonl file with a document for each name."""
    lines = [json.dumps({"id": f"d{name}", "text": f"text {name}"}) for name in names]
    path.write_text("\n".join(lines))
    return str(path)


def test_the_last_tenth_of_one_text_is_held_out_by_characters(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + place) for place in range(1003))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = Corpus(str(tmp_path / "a.txt"))
    assert [*corpus.texts("train")] == [text[:902]]
    assert [*corpus.texts("heldout")] == [text[902:]]


def test_of_many_documents_whole_ones_are_held_out(tmp_path: Path) -> None:
    corpus = Corpus(write_lines(tmp_path / "a.jsonl", range(100)), heldout=0.2)
    train, heldout = [*corpus.documents("train")], [*corpus.documents("heldout")]
    assert (len(train), len(heldout)) == (80, 20)
    assert {d.id for d in train} | {d.id for d in heldout} == {f"d{n}" for n in range(100)}
    assert [*corpus.documents("train")] == train


def test_the_choice_does_not_depend_on_the_order(tmp_path: Path) -> None:
    forward = Corpus(write_lines(tmp_path / "a.jsonl", range(50)))
    backward = Corpus(write_lines(tmp_path / "b.jsonl", range(49, -1, -1)))
    assert {*forward.documents("heldout")} == {*backward.documents("heldout")}
    # It is not simply the end of the file.
    assert {d.id for d in forward.documents("heldout")} != {f"d{n}" for n in range(45, 50)}


@pytest.mark.parametrize(("count", "fraction", "expected"), [(2, 0.01, 1), (3, 0.99, 2)])
def test_both_parts_have_a_document(
    count: int, fraction: float, expected: int, tmp_path: Path
) -> None:
    corpus = Corpus(write_lines(tmp_path / "a.jsonl", range(count)), heldout=fraction)
    assert len([*corpus.documents("heldout")]) == expected


def test_a_second_path_is_the_held_out_part(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", range(4))
    heldout = write_lines(tmp_path / "b.jsonl", range(10, 12))
    corpus = Corpus(train, heldout=heldout)
    assert len([*corpus.documents("train")]) == 4
    assert [d.id for d in corpus.documents("heldout")] == ["d10", "d11"]


def test_held_out_files_are_left_out_of_the_training_part(tmp_path: Path) -> None:
    for name in ("a", "b", "val"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "val.txt")
    corpus = Corpus(str(tmp_path), heldout=str(tmp_path / "v*.txt"))
    assert [*corpus.texts("train")] == ["a", "b"]
    assert [*corpus.texts("heldout")] == ["val"]


def test_nothing_is_held_out_where_the_fraction_is_zero(tmp_path: Path) -> None:
    corpus = Corpus(write_lines(tmp_path / "a.jsonl", range(4)), heldout=0)
    assert not corpus.has_heldout
    assert len([*corpus.documents("train")]) == 4
    assert [*corpus.documents("heldout")] == []


def test_embedded_has_a_split_of_its_own(tmp_path: Path) -> None:
    corpus = Corpus("embedded")
    assert [*corpus.documents("heldout")] == embedded_documents("heldout")
    other = Corpus("embedded", heldout=write_lines(tmp_path / "a.jsonl", range(2)))
    assert [*other.documents("train")] == embedded_documents("train")
    assert [d.id for d in other.documents("heldout")] == ["d0", "d1"]


def test_the_summary_counts_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("的" * 100, encoding="utf-8")
    summary = Corpus(str(tmp_path / "a.txt")).summary()
    assert summary.endswith("train 1 documents 270 bytes, heldout 1 documents 30 bytes")
    assert "sha256" in Corpus("embedded").summary()
