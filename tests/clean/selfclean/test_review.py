"""The sheet for people, out and back."""

import csv
import io
from pathlib import Path

import pytest

from transnormer.clean.selfclean.review import Row, choose, read_verdicts, sheet


def test_every_tenth_of_the_severities_is_on_the_sheet() -> None:
    chosen = choose([float(n) for n in range(1000)], 50, seed=1)
    assert len(chosen) == 50
    assert {number // 100 for number in chosen} == set(range(10))


def test_a_short_corpus_is_on_it_whole() -> None:
    assert sorted(choose([3.0, 1.0, 2.0], 50, seed=1)) == [0, 1, 2]
    assert choose([], 50, seed=1) == []


def test_verdicts_come_back(tmp_path: Path) -> None:
    rows = [Row(f"id{n}", "kept", 1.0, "s", "en", 'text, "quoted"\nline') for n in range(3)]
    table = list(csv.reader(io.StringIO(sheet(rows).decode())))
    table[1][-1], table[2][-1] = "keep", " Drop "
    path = tmp_path / "review.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(table)
    assert read_verdicts(path) == {"id0": "keep", "id1": "drop"}


def test_no_cell_is_run_as_a_formula() -> None:
    assert b",'=HYPERLINK" in sheet([Row("a", "kept", 1.0, "s", "en", "=HYPERLINK(1)")])


@pytest.mark.parametrize(
    ("text", "message"),
    [("id,note\na,b\n", "expected id and verdict"), ("id,verdict\na,maybe\n", "row 2 has")],
)
def test_a_wrong_sheet_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "review.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_verdicts(path)
