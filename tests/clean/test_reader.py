"""Reading untrusted files: parts cover a file once, bad input is named, memory stays flat."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard
from clean_cases import prose, run_clean, where_ids_went, write_lines

from transnormer.clean import units
from transnormer.clean.config import InputConfig
from transnormer.clean.item import QUARANTINED, Item
from transnormer.clean.reader import ReadUnit
from transnormer.clean.units import plan_units


def read_all(path: Path, **options: int) -> list[Item]:
    config = InputConfig(path=str(path), **options)
    units = plan_units(config.path, config.part_bytes)
    reader = ReadUnit(units, config)
    return [item for rank in range(len(units)) for item in reader.run(rank=rank)]


@pytest.mark.parametrize("part_bytes", [1, 7, 50, 1000, 10**9])
@pytest.mark.parametrize("newline_at_the_end", [True, False])
def test_parts_of_a_plain_file_hold_every_line_once(
    part_bytes: int, newline_at_the_end: bool, tmp_path: Path
) -> None:
    lines = [json.dumps({"id": n, "text": "x" * (n % 9)}) for n in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n" * newline_at_the_end)
    items = read_all(path, part_bytes=part_bytes)
    assert [item.id for item in items] == [str(n) for n in range(40)]


def test_parts_name_lines_by_their_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{n}"}}\n\n' for n in range(9)))
    items = read_all(path, part_bytes=30)
    assert [item.id for item in items] == [f"{path}:{1 + 2 * n}" for n in range(9)]


def test_shares_of_a_compressed_file_hold_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = "".join(json.dumps({"id": n, "text": "x"}) + "\n" for n in range(500))
    path.write_bytes(gzip.compress(lines.encode()))
    items = read_all(path, part_bytes=2000)
    assert sorted(int(item.id) for item in items) == list(range(500))
    assert len(plan_units(str(path), 2000)) > 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b"[1]", "no object"),
        (b'{"txt": "a"}', "no text in field 'text'"),
        (b'{"text": 5}', "no text in field 'text'"),
        (b'{"text": "\\ud800"}', "not JSON"),
        (b'{"text": "' + b"x" * 300 + b'"}', "a line of more than 200 bytes"),
    ],
)
def test_a_bad_line_is_named_and_the_next_one_read(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1, "text": "a"}\n' + line + b'\n{"id": 3, "text": "c"}\n')
    first, bad, last = read_all(path, max_document_bytes=200)
    assert (first.id, last.id) == ("1", "3")
    assert (bad.out, bad.id) == (QUARANTINED, f"{path}:2")
    assert bad.why["line"] == 2
    assert bad.why["reason"].startswith(reason)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_damaged_archive_is_named_once_and_its_head_read(compress, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": n, "text": prose(n)}) + "\n" for n in range(400))
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.xz")
    path.write_bytes(compress(lines.encode())[:-3000])
    for part_bytes in (10**9, path.stat().st_size):
        items = read_all(path, part_bytes=part_bytes)
        bad = [item for item in items if item.out == QUARANTINED]
        assert len(bad) == 1
        assert "damaged" in bad[0].why["reason"]
        # Cut within a document or a block: what was whole before it is there, each once.
        ids = [int(item.id) for item in items if item.out is None]
        assert sorted(ids) == list(range(len(ids)))


def test_an_archive_that_asks_for_a_gigabyte_is_named_before_it_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    path.write_bytes(lzma.compress(b'{"text": "x"}\n', filters=filters))
    (item,) = read_all(path)
    assert item.out == QUARANTINED
    assert "Memory usage limit exceeded" in item.why["reason"]


@pytest.mark.parametrize(
    "data", [b"", bytes(64), lzma.compress(b"{}\n") + b"more"], ids=str.split("empty zeros more")
)
def test_what_is_no_archive_of_streams_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(data)
    assert "is damaged" in read_all(path)[-1].why["reason"]


@pytest.mark.parametrize("between", [b"", b"\0" * 8])
def test_an_archive_may_have_several_streams(between: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    line = json.dumps({"text": "x" * 100_000}).encode() + b"\n"
    path.write_bytes(lzma.compress(line) + between + lzma.compress(line, preset=9) + between)
    assert [len(item.text) for item in read_all(path)] == [100_000, 100_000]


def test_texts_pages_and_archives_of_pages_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.html").write_text("<html><body><p>page</p></body></html>")
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body>web</body></html>"
    head = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        "WARC-Target-URI: http://example.org/\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    (tmp_path / "c.warc.gz").write_bytes(gzip.compress(head.encode() + body + b"\r\n\r\n"))
    items = read_all(tmp_path)
    assert [item.text for item in items] == [
        "plain",
        "<html><body><p>page</p></body></html>",
        "<html><body>web</body></html>",
    ]
    assert items[2].metadata["url"] == "http://example.org/"


def test_a_table_gives_its_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3], "text": ["a", None, "c"], "source": ["x", "y", "z"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    items = read_all(tmp_path)
    assert [(item.id, item.out) for item in items][0::2] == [("1", None), ("3", None)]
    assert items[1].out == QUARANTINED
    assert items[0].metadata == {"source": "x"}


def test_a_row_that_is_too_long_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": ["a", "b", "c"], "text": ["x", "y" * 300, "z"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, bad, last = read_all(tmp_path, max_document_bytes=200)
    assert (first.id, last.id) == ("a", "c")
    assert bad.why["reason"] == "a row of more than 200 bytes"


@pytest.mark.parametrize(
    ("name", "package", "extra", "compression"),
    [
        ("b.parquet", "pyarrow", "parquet", "none"),
        ("b.jsonl.zst", "zstandard", "zstd", "none"),
        ("compression = 'zstd'", "zstandard", "zstd", "zstd"),
    ],
    ids=["parquet", "zst", "output"],
)
def test_a_package_that_is_not_installed_is_named_before_anything_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    package: str,
    extra: str,
    compression: str,
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"id": "good", "text": prose(1)}])
    if compression == "none":
        (tmp_path / "in" / name).write_bytes(b"")
    out = tmp_path / "out"
    monkeypatch.setattr(units, "find_spec", lambda asked: None if asked == package else asked)
    with pytest.raises(RuntimeError, match=rf"{name} needs {package}; run: .*\[{extra}\]"):
        run_clean(tmp_path / "in", out, output={"dir": str(out), "compression": compression})
    assert not out.exists()


def test_the_run_stops_at_bad_input_where_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("broken\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not JSON"):
        run_clean(path, tmp_path / "out", on_bad_input="stop")


def test_bad_input_is_quarantined_by_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"id": "good", "text": prose(1)}])
    (tmp_path / "in" / "b.jsonl").write_text("broken\n")
    report = run_clean(tmp_path / "in", tmp_path / "out")
    bad = f"{tmp_path / 'in' / 'b.jsonl'}:1"
    assert where_ids_went(tmp_path / "out") == {"good": "clean", bad: "quarantined"}
    assert report["reasons"] == {"read: not JSON": 1}


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("x")
    with pytest.raises(ValueError, match=r"input.path holds .*udcff.txt'; expected names of files"):
        read_all(tmp_path)


def test_nothing_to_read_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"input\.path is"):
        plan_units(str(tmp_path), 1000)


BOMB = """
import sys
from pathlib import Path
from transnormer.clean.config import InputConfig
from transnormer.clean.reader import ReadUnit
from transnormer.clean.units import plan_units
config = InputConfig(path=sys.argv[1])
units = plan_units(config.path, config.part_bytes)
for rank in range(len(units)):
    for item in ReadUnit(units, config).run(rank=rank):
        print(item.why["reason"] if item.out else item.id)
print("peak", next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


HUGE = 1 << 30
NEXT = b'\n{"id": "next", "text": "y"}\n'


def write_bomb(path: Path, kind: str) -> None:
    """A document of a gigabyte, and one behind it where the kind holds several."""
    block = b"x" * (1 << 20)
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="reading Parquet needs pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"id": ["big", "next"], "text": ["x" * (HUGE // 2), "y"]})
        parquet.write_table(table, path, row_group_size=1, compression="gzip")
        return
    openers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".xz": partial(lzma.open, preset=0),
        ".zst": zstandard.open,
    }
    with openers.get(path.suffix, open)(path, "wb") as stream:
        if kind == "warc.gz":
            stream.write(
                b"WARC/1.0\r\nWARC-Type: resource\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
                b"Content-Type: text/html\r\nContent-Length: %d\r\n\r\n" % HUGE
            )
        for _ in range(HUGE >> 20):
            stream.write(block)
        stream.write(NEXT if kind.startswith("jsonl") else b"\r\n\r\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("jsonl", "a line of more than"),
        ("jsonl.gz", "a line of more than"),
        ("jsonl.xz", "a line of more than"),
        ("jsonl.zst", "a line of more than"),
        ("html.gz", "a file of more than"),
        ("warc.gz", "a record of more than"),
        ("parquet", "rows of more than"),
    ],
)
def test_a_document_of_a_gigabyte_takes_less_than_half_of_one(
    kind: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{kind}"
    write_bomb(path, kind)
    found = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=True
    )
    assert int(found.stdout.split("peak ")[1]) < 500 * 1024
    assert found.stdout.count(reason) == 1
    assert ("next" in found.stdout) == (kind.startswith("jsonl") or kind == "parquet")
