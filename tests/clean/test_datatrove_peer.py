"""Near duplicates beside datatrove's own four MinHash stages."""

import struct
from pathlib import Path

import pytest
from clean_cases import edited, prose, read_lines, run_clean, write_lines
from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer


class Spaces(WordTokenizer):
    """Words between spaces: datatrove's English one needs spaCy."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise AssertionError("MinHash needs no sentences")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise AssertionError("MinHash needs no spans")


def datatrove_drops(texts: list[str], directory: Path) -> set[int]:
    """The documents that datatrove's stages remove."""
    config = MinhashConfig(
        n_grams=5, num_buckets=20, hashes_per_bucket=5, hash_config=HashConfig(hash_fc="sha1")
    )
    documents = (Document(text=text, id=str(n)) for n, text in enumerate(texts))
    folders = [str(directory / name) for name in ("signatures", "buckets", "clusters")]
    MinhashDedupSignature(folders[0], config, language=Spaces()).run(documents)
    for rank in range(20):
        MinhashDedupBuckets(folders[0], folders[1], config=config, only_dedup_in_index=False).run(
            None, rank, 20
        )
    MinhashDedupCluster(folders[1], folders[2], config=config).run(None, 0, 1)
    removed = Path(folders[2]) / "000000.remove"
    data = removed.read_bytes() if removed.is_file() else b""
    return {number for (number,) in struct.iter_unpack("<I", data)}


@pytest.mark.parametrize("changes", [2])
def test_the_same_documents_are_near_duplicates(changes: int, tmp_path: Path) -> None:
    texts = [prose(n, 200) for n in range(40)]
    texts += [edited(text, n, changes) for n, text in enumerate(texts[:25])]
    theirs = datatrove_drops(texts, tmp_path / "theirs")
    write_lines(tmp_path / "in.jsonl", [{"id": n, "text": text} for n, text in enumerate(texts)])
    run_clean(tmp_path / "in.jsonl", tmp_path / "out")
    ours = {int(record["id"]) for record in read_lines(tmp_path / "out" / "dropped")}
    # Which member of a pair goes is each one's choice.
    assert {number % 40 for number in theirs} == {number % 40 for number in ours} == set(range(25))
