"""The default corpus: what is in it, that nothing is in both parts, that it is read, not run."""

import sys
from pathlib import Path

import pytest

from transnormer.data import embedded
from transnormer.data.embedded import embedded_documents, embedded_hash, embedded_modules


def test_it_holds_six_to_twelve_megabytes_and_a_tenth_is_held_out() -> None:
    sizes = {
        split: sum(len(document.text.encode()) for document in embedded_documents(split))
        for split in ("train", "heldout")
    }
    assert 6e6 <= sum(sizes.values()) <= 12e6
    assert 0.05 <= sizes["heldout"] / sum(sizes.values()) <= 0.15


def test_no_module_is_in_both_parts() -> None:
    train, heldout = embedded_modules("train"), embedded_modules("heldout")
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train)
    # A package is in one part as a whole.
    assert not {name.split(".")[0] for name in train} & {name.split(".")[0] for name in heldout}


def test_help_topics_are_for_training_alone() -> None:
    topics = {
        split: [d.id for d in embedded_documents(split) if d.id.startswith("pydoc_data.topics:")]
        for split in ("train", "heldout")
    }
    assert len(topics["train"]) > 70
    assert topics["heldout"] == []


def test_sources_hold_their_docstrings() -> None:
    sources = dict(embedded_documents("heldout"))
    assert "Heap queue algorithm" in sources["heapq"]
    assert "def heappush(heap, item):" in sources["heapq"]


def test_the_hash_depends_on_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = embedded_hash()
    assert len(before) == 64
    assert embedded_hash() == before
    first, *rest = embedded_documents("heldout")
    changed = [first._replace(text="other"), *rest]
    documents = {"train": embedded_documents("train"), "heldout": changed}
    monkeypatch.setattr(embedded, "embedded_documents", documents.__getitem__)
    assert embedded_hash() != before


def test_modules_are_read_without_importing_them() -> None:
    embedded_documents.cache_clear()
    before = set(sys.modules)
    embedded_documents("train")
    # decode_source looks for the coding line with tokenize.
    new = set(sys.modules) - before - {"tokenize"}
    assert not new & set(embedded_modules("train"))
    assert "turtle" in embedded_modules("train")
    assert "turtle" not in sys.modules


def test_a_file_of_the_same_name_does_not_take_a_modules_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heapq.py").write_text("mine")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    embedded_documents.cache_clear()
    assert dict(embedded_documents("heldout"))["heapq"] != "mine"


def test_a_python_without_sources_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded_documents.cache_clear()
    monkeypatch.setattr(embedded, "_HELDOUT", "heapq nothing.like this_module")
    with pytest.raises(RuntimeError, match=r"lacks 2 modules .*\(nothing.like, this_module\)"):
        embedded_documents("heldout")
    embedded_documents.cache_clear()
