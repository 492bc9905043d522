"""Duplicates: what is found, what is kept, and that no unlike text is dropped."""

from pathlib import Path
from typing import Any

import pytest
from clean_cases import edited, prose, read_lines, run_clean, where_ids_went, write_lines

from transnormer.clean.words import jaccard, shingle_set


def clean(texts: list[str], tmp_path: Path, **dedup: Any) -> dict[str, dict[str, Any]]:
    """Clean texts named by their number; returns what was dropped."""
    records = [{"id": str(n), "text": text} for n, text in enumerate(texts)]
    path = write_lines(tmp_path / "in" / "a.jsonl", records)
    run_clean(path, tmp_path / "out", dedup=dedup)
    assert len(where_ids_went(tmp_path / "out")) == len(texts)
    return {record["id"]: record for record in read_lines(tmp_path / "out" / "dropped")}


def test_equal_words_are_exact_duplicates_of_the_first(tmp_path: Path) -> None:
    text = prose(1)
    dropped = clean([prose(2), text, text.upper(), prose(3), text + "  !"], tmp_path)
    assert {name: found["duplicate_of"] for name, found in dropped.items()} == {"2": "1", "4": "1"}
    assert {found["reason"] for found in dropped.values()} == {"exact"}


def test_near_duplicates_are_dropped_with_their_similarity(tmp_path: Path) -> None:
    texts = [prose(n) for n in range(20)]
    texts += [edited(text, n, 2) for n, text in enumerate(texts)]
    dropped = clean(texts, tmp_path)
    assert {name: found["duplicate_of"] for name, found in dropped.items()} == {
        str(n + 20): str(n) for n in range(20)
    }
    for name, found in dropped.items():
        exact = jaccard(*(shingle_set(texts[int(n)], 5) for n in (name, found["duplicate_of"])))
        assert found["similarity"] == pytest.approx(exact, abs=5e-5)


def test_pairs_below_the_threshold_stay(tmp_path: Path) -> None:
    texts = [prose(n) for n in range(20)]
    texts += [edited(text, n, 12) for n, text in enumerate(texts)]
    similar = [jaccard(shingle_set(texts[n], 5), shingle_set(texts[n + 20], 5)) for n in range(20)]
    assert max(similar) < 0.7
    assert clean(texts, tmp_path) == {}


def test_a_chain_of_small_changes_drops_nothing_unlike_what_is_kept(tmp_path: Path) -> None:
    texts = [prose(1, 200)]
    for step in range(12):
        texts.append(edited(texts[-1], step, 4))
    dropped = clean(texts, tmp_path)
    assert dropped
    for name, found in dropped.items():
        kept = texts[int(found["duplicate_of"])]
        assert jaccard(shingle_set(texts[int(name)], 5), shingle_set(kept, 5)) >= 0.5
        assert found["duplicate_of"] not in dropped
    assert jaccard(shingle_set(texts[0], 5), shingle_set(texts[-1], 5)) < 0.5
    assert len(dropped) < len(texts) - 1


def test_chinese_texts_are_compared_by_characters(tmp_path: Path) -> None:
    rng = __import__("random").Random(1)
    text = "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(300))
    changed = text[:150] + "新" + text[151:]
    assert set(clean([text, changed], tmp_path)) == {"1"}


def test_switches_are_obeyed(tmp_path: Path) -> None:
    text = prose(1)
    texts = [text, text, edited(text, 1, 1)]
    assert set(clean(texts, tmp_path / "a", exact=False, near=False)) == set()
    assert set(clean(texts, tmp_path / "b", near=False)) == {"1"}
    assert set(clean(texts, tmp_path / "c", exact=False)) == {"1", "2"}


def test_a_work_cut_elsewhere_is_contained(tmp_path: Path) -> None:
    lines = prose(1, 12_000).split("\n")
    half, third = len(lines) // 2, len(lines) // 3
    # One edition in halves, the other in thirds: no two parts are near duplicates.
    first = ["\n".join(lines[:half]), "\n".join(lines[half:])]
    second = ["\n".join(lines[start : start + third]) for start in range(0, 3 * third, third)]
    other = prose(2, 4000)
    assert clean([*first, *second, other], tmp_path / "a") == {}
    dropped = clean([*first, *second, other], tmp_path / "b", containment=0.8)
    assert {name: found["reason"] for name, found in dropped.items()} == dict.fromkeys(
        "234", "contained"
    )


def test_many_equal_bands_cost_no_square(tmp_path: Path) -> None:
    text = prose(1)
    texts = [edited(text, n, 1) for n in range(150)]
    dropped = clean(texts, tmp_path, exact=False)
    assert len(dropped) == 149
