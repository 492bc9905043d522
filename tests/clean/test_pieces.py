"""Lines and paragraphs that repeat those of an earlier document: what is cut, and what stays."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from clean_cases import edited, prose, read_lines, run_clean, where_ids_went, write_lines

from transnormer.clean.pieces import find_pieces
from transnormer.clean.words import jaccard, shingle_set


def paragraph(seed: int, words: int = 60) -> str:
    return prose(seed, words).replace("\n", " ")


def document(*seeds: int) -> str:
    return "\n\n".join(map(paragraph, seeds))


def clean(texts: list[str], tmp_path: Path, **tables: Any) -> dict[str, dict[str, Any]]:
    """Clean texts named by their number; returns what is kept by name."""
    records = [{"id": str(n), "text": text} for n, text in enumerate(texts)]
    path = write_lines(tmp_path / "in" / "a.jsonl", records)
    dedup = {"pieces": "paragraphs", **tables.pop("dedup", {})}
    run_clean(path, tmp_path / "out", dedup=dedup, **tables)
    assert len(where_ids_went(tmp_path / "out")) == len(texts)
    return {record["id"]: record for record in read_lines(tmp_path / "out" / "clean")}


def test_lines_are_parts_of_a_text_and_blank_ones_are_not() -> None:
    text = "one\n\n  two\n```\ncode\n```\n$$x$$\nend"
    assert [text[a:b] for a, b in find_pieces(text, "lines")] == ["one\n", "  two\n", "end"]


def test_paragraphs_end_at_blank_lines_and_hold_neither_code_nor_formulas() -> None:
    text = "one\ntwo\n \nthree\n\n```\na\n\nb\n```\n\nso\n$$x$$\n\n    code\n\nend"
    assert [text[a:b] for a, b in find_pieces(text, "paragraphs")] == [
        "one\ntwo\n",
        "three\n",
        "end",
    ]


@pytest.mark.parametrize("changes", [0, 1])
def test_a_paragraph_that_repeats_an_earlier_documents_is_cut(changes: int, tmp_path: Path) -> None:
    again = edited(paragraph(2), 7, changes)
    assert jaccard(shingle_set(paragraph(2), 5), shingle_set(again, 5)) >= 0.7
    texts = [document(1, 2, 3), "\n\n".join([paragraph(4), again, paragraph(5)]), document(6, 7)]
    kept = clean(texts, tmp_path)
    assert kept["0"]["text"] == texts[0]
    assert kept["1"]["text"] == document(4, 5)
    assert kept["1"]["edits"] == {"repeated_pieces": 1}
    assert kept["2"]["text"] == texts[2]


def test_a_cut_leaves_the_blank_lines_of_code(tmp_path: Path) -> None:
    code = "```\na = 1\n\n\nb = 2\n```"
    texts = [document(1, 2), "\n\n".join([paragraph(3), code, paragraph(2), paragraph(4)])]
    kept = clean(texts, tmp_path)
    assert kept["1"]["text"] == "\n\n".join([paragraph(3), code, paragraph(4)])


def test_a_paragraph_below_the_threshold_stays(tmp_path: Path) -> None:
    like = edited(paragraph(2), 7, 8)
    assert jaccard(shingle_set(paragraph(2), 5), shingle_set(like, 5)) < 0.7
    texts = [document(1, 2), "\n\n".join([paragraph(3), like])]
    assert [record["text"] for record in clean(texts, tmp_path).values()] == texts


def test_lines_that_repeat_are_cut_and_short_ones_stay(tmp_path: Path) -> None:
    line, short = paragraph(9, 25), "Chapter the first of the book"
    texts = [f"{short}\n{line}\n{paragraph(1)}", f"{paragraph(2)}\n{short}\n{line}\n{paragraph(3)}"]
    kept = clean(texts, tmp_path, dedup={"pieces": "lines"})
    assert kept["0"]["text"] == texts[0]
    assert kept["1"]["text"] == f"{paragraph(2)}\n{short}\n{paragraph(3)}"


def test_chinese_paragraphs_are_compared_by_characters(tmp_path: Path) -> None:
    rng = random.Random(1)
    han = ["".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(80)) for _ in range(4)]
    changed = han[1][:40] + "新" + han[1][41:]
    kept = clean([f"{han[0]}\n\n{han[1]}", f"{han[2]}\n\n{changed}\n\n{han[3]}"], tmp_path)
    assert kept["1"]["text"] == f"{han[2]}\n\n{han[3]}"


def test_what_repeats_within_a_document_stays(tmp_path: Path) -> None:
    song = document(1, 9, 2, 9)
    kept = clean([song, document(3, 9, 4)], tmp_path)
    assert kept["0"]["text"] == song
    assert kept["1"]["text"] == document(3, 4)


def test_a_document_of_nothing_but_repeated_parts_is_dropped(tmp_path: Path) -> None:
    texts = [document(1, 2, 3, 4), document(5, 6, 7, 8), document(1, 6)]
    assert set(clean(texts, tmp_path)) == {"0", "1"}
    dropped = read_lines(tmp_path / "out" / "dropped")
    assert [(record["id"], record["reason"]) for record in dropped] == [("2", "pieces")]


def test_documents_that_are_dropped_keep_no_part_of_others_out(tmp_path: Path) -> None:
    # The second is a duplicate of the first but for its last paragraph, which the third has too.
    first, second = document(*range(1, 9)), document(*range(1, 10))
    kept = clean([first, second, document(20, 9, 21)], tmp_path)
    assert kept["2"]["text"] == document(20, 9, 21)
    assert "1" not in kept


def test_parts_workers_and_rounds_see_the_same_texts(tmp_path: Path) -> None:
    texts = [document(n, n + 1, 100 + n) for n in range(40)]
    one = clean(texts, tmp_path / "one")
    two = clean(texts, tmp_path / "two", input={"part_bytes": 3000}, executor={"workers": 2})
    three = clean(texts, tmp_path / "three", selfclean={"rounds": 1, "max_drop": 0.01})
    assert one == two == three
    seen = "".join(f"{record['id']}\n{record['text']}\n" for record in three.values())
    manifest = json.loads((tmp_path / "three/out/work/selfclean/round_01.json").read_text())
    assert manifest["input_sha256"] == hashlib.sha256(seen.encode()).hexdigest()
    assert sum(record["edits"].get("repeated_pieces", 0) for record in one.values()) == 39
