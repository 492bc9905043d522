"""Labelled texts: what is read, a split that no order changes, and batches that resume."""

import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transnormer.data import ByteTokenizer, Fields, LabelledLoader, LabelledSource
from transnormer.data.classification import (
    Labelled,
    LabelledBatch,
    find_classes,
    read_labelled,
    split_labelled,
    write_labelled,
)

PLAIN = Fields("text", "label")
CHOSEN = Fields("query", "gold", "choices")
START = ByteTokenizer.bos_id


def write_lines(path: Path, rows: list[Any]) -> Path:
    """A file of JSON lines, packed where its name says so."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


def some(count: int, classes: int = 2) -> list[Labelled]:
    """Different texts of growing length."""
    return [Labelled(f"t:{i}", f"{i:03d}" + "x" * (i % 7), f"c{i % classes}") for i in range(count)]


def make_source(directory: Path, texts: list[Labelled] | None = None) -> LabelledSource:
    texts = some(10) if texts is None else texts
    write_labelled(texts, find_classes(texts), ByteTokenizer(), directory, source="test")
    return LabelledSource(directory)


def text_of(batch: LabelledBatch, row: int) -> str:
    return ByteTokenizer().decode(batch.input_ids[row, batch.mask[row]].tolist())


def same(one: LabelledBatch, other: LabelledBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz"])
def test_lines_give_texts_and_labels(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one", "label": "b", "more": 1}, {"text": "two", "label": "a"}]
    path = write_lines(tmp_path / name, rows)
    found = read_labelled(str(path), PLAIN)
    assert found.choices is None
    assert found.texts == [Labelled(f"{path}:1", "one", "b"), Labelled(f"{path}:2", "two", "a")]


def test_an_index_into_choices_is_a_class_by_name(tmp_path: Path) -> None:
    rows = [{"query": q, "choices": ["no", "yes"], "gold": g} for q, g in (("q", 1), ("r", 0))]
    found = read_labelled(str(write_lines(tmp_path / "a.jsonl", rows)), CHOSEN)
    assert found.choices == ("no", "yes")
    assert [text.label for text in found.texts] == ["yes", "no"]


def test_folders_give_their_jsonl_files_alone(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "b", "label": 1}])
    write_lines(tmp_path / "a.jsonl", [{"text": "a", "label": 2}])
    (tmp_path / "readme.md").write_text("no data")
    assert [text.text for text in read_labelled(str(tmp_path), PLAIN).texts] == ["a", "b"]
    without = {(tmp_path / "a.jsonl").resolve()}
    assert [t.text for t in read_labelled(str(tmp_path), PLAIN, without=without).texts] == ["b"]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ([1], PLAIN, "a.jsonl:1 is no object"),
        ({"text": "x"}, PLAIN, "a.jsonl:1 has no field 'label'; .* its fields are text"),
        ({"text": "", "label": 0}, PLAIN, "a.jsonl:1: text is ''; expected a text"),
        ({"text": 3, "label": 0}, PLAIN, "a.jsonl:1: text is 3; expected a text"),
        ({"text": "x", "label": 0.5}, PLAIN, "a.jsonl:1: label is 0.5; expected a string"),
        ({"text": "x", "label": None}, PLAIN, "a.jsonl:1: label is None; expected a string"),
        ({"text": "\ud800", "label": 0}, PLAIN, "a.jsonl:1 holds a lone surrogate"),
        ({"query": "x", "gold": 2, "choices": ["a", "b"]}, CHOSEN, "gold is 2; .* 0 to 1"),
        ({"query": "x", "gold": "a", "choices": ["a", "b"]}, CHOSEN, "gold is 'a'; .* index"),
        ({"query": "x", "gold": 0, "choices": "ab"}, CHOSEN, "choices is 'ab'; expected a list"),
        ({"query": "x", "gold": 0, "choices": ["a", "a"]}, CHOSEN, "list of different strings"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, fields: Fields, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=message) as caught:
        read_labelled(str(path), fields)
    assert "\n" not in str(caught.value)


def test_choices_that_change_are_no_classes(tmp_path: Path) -> None:
    rows = [{"query": "x", "gold": 0, "choices": names} for names in (["a", "b"], ["a", "c"])]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a.jsonl:2: choices is \['a', 'c'\]; expected"):
        read_labelled(str(path), CHOSEN)


def test_files_without_a_line_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain text")
    for name in ("a.txt", ""):
        with pytest.raises(ValueError, match="holds no line of JSON"):
            read_labelled(str(tmp_path / name), PLAIN)
    with pytest.raises(FileNotFoundError, match="data.path is 'nowhere'"):
        read_labelled("nowhere", PLAIN)


@pytest.mark.parametrize(("share", "count"), [(0.2, 20), (0.001, 1), (0.999, 99)])
def test_a_share_of_the_texts_is_held_out(share: float, count: int) -> None:
    train, heldout = split_labelled(some(100), share, 0)
    assert len(heldout) == count
    assert sorted(train + heldout) == sorted(some(100))


def test_the_split_depends_on_texts_and_seed_alone() -> None:
    renamed = [text._replace(name="elsewhere") for text in reversed(some(100))]
    held = {text.text for text in split_labelled(some(100), 0.2, 0)[1]}
    assert {text.text for text in split_labelled(renamed, 0.2, 0)[1]} == held
    assert {text.text for text in split_labelled(some(100), 0.2, 1)[1]} != held


def test_equal_texts_are_on_one_side() -> None:
    train, heldout = split_labelled(some(50) * 3, 0.3, 0)
    assert {text.text for text in train}.isdisjoint(text.text for text in heldout)
    assert len(heldout) == 45


def test_classes_are_sorted() -> None:
    labels: list[Any] = ["b", "a", "c", "a"]
    assert find_classes(Labelled("", "x", label) for label in labels) == ("a", "b", "c")
    labels = [10, 9, 10]
    assert find_classes(Labelled("", "x", label) for label in labels) == (9, 10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a", 1], "integers and strings"), (["a", "a"], "has 1 class"), ([], "has 0 class")],
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_classes(Labelled("", "x", label) for label in labels)


def test_booleans_are_classes_by_name(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": True}, {"text": "y", "label": False}]
    found = read_labelled(str(write_lines(tmp_path / "a.jsonl", rows)), PLAIN)
    assert find_classes(found.texts) == ("false", "true")


def test_a_class_that_training_never_saw_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t:1: label is 'c1'; expected a class .*: c0, c2;"):
        write_labelled(some(3, 3), ("c0", "c2"), ByteTokenizer(), tmp_path / "d", source="test")


def test_a_source_holds_what_was_written(tmp_path: Path) -> None:
    source = make_source(tmp_path / "d")
    assert len(source) == 10
    assert source.labels.tolist() == [0, 1] * 5
    assert source.lengths().tolist() == [len(text.text) for text in some(10)]


def test_the_most_frequent_class_of_several_is_the_first(tmp_path: Path) -> None:
    assert make_source(tmp_path / "d").most_frequent() == 0
    assert make_source(tmp_path / "e", some(9)[1:]).most_frequent() == 0
    assert make_source(tmp_path / "f", some(8)[1:]).most_frequent() == 1


def test_labels_that_do_not_fit_the_texts_are_refused(tmp_path: Path) -> None:
    make_source(tmp_path / "d")
    np.save(tmp_path / "d" / "labels.npy", np.zeros(9, dtype="<i8"))
    with pytest.raises(ValueError, match=r"labels.npy has shape \[9\]; expected .* 10 texts"):
        LabelledSource(tmp_path / "d")
    (tmp_path / "d" / "labels.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="labels.npy cannot be read"):
        LabelledSource(tmp_path / "d")


def test_a_batch_is_padded_at_the_right(tmp_path: Path) -> None:
    batch = LabelledLoader(make_source(tmp_path / "d"), seq=16, batch=4, seed=0).batch(0)
    assert batch.input_ids.shape == batch.mask.shape
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    lengths = batch.mask.sum(1)
    assert batch.input_ids.shape == (4, int(lengths.max()))
    assert bool((batch.mask == (torch.arange(batch.mask.shape[1]) < lengths[:, None])).all())
    assert batch.input_ids[:, 0].tolist() == [START] * 4
    for row in range(4):
        number = int(text_of(batch, row)[:3])
        assert text_of(batch, row) == some(10)[number].text
        assert int(lengths[row]) == 1 + len(some(10)[number].text)
        assert int(batch.labels[row]) == number % 2


@pytest.mark.parametrize(("cut", "expected"), [("end", "abc"), ("start", "def")])
def test_a_long_text_is_cut_at_one_end(tmp_path: Path, cut: str, expected: str) -> None:
    texts = [Labelled("", "abcdef", "a"), Labelled("", "xy", "b")]
    loader = LabelledLoader(make_source(tmp_path / "d", texts), seq=4, batch=2, seed=0, cut=cut)
    batch = loader.collate([0, 1])
    assert [text_of(batch, row) for row in range(2)] == [expected, "xy"]
    assert batch.input_ids[0, 0] == START


def test_each_epoch_visits_each_text_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    loader = LabelledLoader(make_source(tmp_path / "d"), seq=16, batch=5, seed=0)
    orders = [[loader.locate(epoch * 10 + k)[1] for k in range(10)] for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    seen = [text_of(loader.batch(step), row) for step in (0, 1) for row in range(5)]
    assert seen == [some(10)[index].text for index in orders[0]]


def test_batches_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    source = make_source(tmp_path / "d")
    loader = LabelledLoader(source, seq=16, batch=3, seed=0)
    later = loader.batch(7)
    loader.batch(2)
    assert same(LabelledLoader(source, seq=16, batch=3, seed=0).batch(7), later)
    assert not same(LabelledLoader(source, seq=16, batch=3, seed=1).batch(7), later)


def test_the_ranks_share_the_rows(tmp_path: Path) -> None:
    loader = LabelledLoader(make_source(tmp_path / "d"), seq=16, batch=4, seed=0)
    whole = [text_of(loader.batch(1), row) for row in range(4)]
    parts = [loader.for_rank(rank, 2).batch(1) for rank in range(2)]
    assert [text_of(parts[i % 2], i // 2) for i in range(4)] == whole


def test_in_order_of_length_every_text_comes_once(tmp_path: Path) -> None:
    loader = LabelledLoader(make_source(tmp_path / "d"), seq=16, batch=4, seed=0)
    batches = list(loader.in_order_of_length())
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    lengths = [int(n) for batch in batches for n in batch.mask.sum(1)]
    assert lengths == sorted(lengths, reverse=True)
    texts = [text_of(batch, row) for batch in batches for row in range(len(batch.labels))]
    assert Counter(texts) == Counter(text.text for text in some(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq": 1}, "data.seq is 1; expected at least 2"),
        ({"batch": 0}, "batch is 0; expected at least 1"),
        ({"cut": "middle"}, "cut is 'middle'; expected 'start' or 'end'"),
    ],
)
def test_loaders_that_cannot_be_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    source = make_source(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        LabelledLoader(source, **{"seq": 8, "batch": 2, "seed": 0, **changes})
