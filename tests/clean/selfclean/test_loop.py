"""Rounds: what they drop, when they end, and that they are written once."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from clean_cases import grammar, read_lines, run_clean, shuffled, where_ids_went, write_lines

from transnormer.clean.config import SelfCleanConfig
from transnormer.clean.selfclean import loop
from transnormer.clean.selfclean.loop import Scorer, Text, run_rounds
from transnormer.clean.selfclean.ngram import NgramScorer, Scores

GOOD, BAD = 200, 12


class Texts:
    """Good texts, and among them shuffled ones."""

    def texts(self) -> Iterator[Text]:
        for number in range(GOOD + BAD):
            bad = number % 17 == 0 and number // 17 < BAD
            text = grammar(number)
            yield Text(
                number,
                f"{'bad' if bad else 'good'}{number}",
                shuffled(text, number) if bad else text,
                "source",
                "en",
            )


def ngram(number: int, fold: int) -> Scorer:
    return NgramScorer(5, table_bits=18)


def rounds(directory: Path, **options: Any) -> tuple[set[str], list[dict[str, Any]]]:
    """The ids that are dropped, and the manifests."""
    config = SelfCleanConfig(**{"rounds": 3, "max_drop": 0.2, **options})
    gone = run_rounds(Texts(), config, ngram, directory)
    names = {text.number: text.id for text in Texts().texts()}
    manifests = [json.loads(path.read_text()) for path in sorted(directory.glob("round_*.json"))]
    return {names[number] for number in gone}, manifests


def test_texts_without_order_go_and_the_others_stay(tmp_path: Path) -> None:
    dropped, manifests = rounds(tmp_path)
    assert {name for name in dropped if name.startswith("bad")} == {
        text.id for text in Texts().texts() if text.id.startswith("bad")
    }
    assert len(dropped) <= BAD + 0.03 * GOOD
    assert manifests[0]["reasons"]["no_context"] >= BAD
    assert manifests[-1]["documents"] < GOOD + BAD


def test_a_round_drops_no_more_than_its_share_and_the_worst_first(tmp_path: Path) -> None:
    _, manifests = rounds(tmp_path, rounds=1, max_drop=0.02)
    severities = [entry["severity"] for entry in manifests[0]["dropped"]]
    assert len(severities) == int(0.02 * (GOOD + BAD))
    _, free = rounds(tmp_path / "free", rounds=1)
    assert min(severities) >= sorted(e["severity"] for e in free[0]["dropped"])[-len(severities)]


def test_a_round_that_drops_little_is_the_last(tmp_path: Path) -> None:
    _, manifests = rounds(tmp_path, rounds=9, min_drop=0.5)
    assert len(manifests) == 1


def test_no_text_is_scored_by_what_saw_it(tmp_path: Path) -> None:
    class Watch:
        """Remembers what it was fitted on."""

        def fit(self, texts: Any) -> "Watch":
            self.seen = set(texts)
            return self

        def score(self, texts: Sequence[str]) -> list[Scores]:
            assert not self.seen & set(texts)
            return [Scores(1.0, 1.0)] * len(texts)

    config = SelfCleanConfig(rounds=1, folds=3)
    assert run_rounds(Texts(), config, lambda number, fold: Watch(), tmp_path) == {}


class Counting:
    """Scores everything alike, and remembers how many texts came at a time."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def fit(self, texts: Any) -> "Counting":
        return self

    def score(self, texts: Sequence[str]) -> list[Scores]:
        self.calls.append(len(texts))
        return [Scores(1.0, 1.0)] * len(texts)


def test_documents_are_scored_many_at_a_time(tmp_path: Path) -> None:
    scorers: list[Counting] = []

    def make(number: int, fold: int) -> Scorer:
        scorers.append(Counting())
        return scorers[-1]

    run_rounds(Texts(), SelfCleanConfig(rounds=1), make, tmp_path)
    # The second call is the held-out text's.
    assert [len(scorer.calls) for scorer in scorers] == [2, 2]
    assert sum(scorer.calls[0] for scorer in scorers) == GOOD + BAD


def test_what_is_not_scored_when_it_is_stopped_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = list(Texts().texts())
    monkeypatch.setattr(loop, "_GROUP", sum(len(text.text) for text in texts) // 2)
    lines: list[str] = []
    config = SelfCleanConfig(rounds=1, max_drop=0.2)
    gone = run_rounds(Texts(), config, ngram, tmp_path, tell=lines.append, stop=lambda: bool(lines))
    manifest = json.loads((tmp_path / "round_01.json").read_text())
    assert GOOD + BAD > manifest["documents"] > 0.4 * GOOD
    assert gone
    assert max(gone) < manifest["documents"]
    ends = ["fold 0 is fitted", "fold 1 is fitted", f"{manifest['documents']} documents are scored"]
    assert [line.partition(": ")[2] for line in lines] == [*ends, "stopped"]


def test_rounds_that_are_written_are_not_repeated(tmp_path: Path) -> None:
    first, manifests = rounds(tmp_path, rounds=2)

    def refuse(number: int, fold: int) -> Scorer:
        raise AssertionError("a round was repeated")

    config = SelfCleanConfig(rounds=2, max_drop=0.2)
    again = run_rounds(Texts(), config, refuse, tmp_path)
    assert len(again) == len(first)
    assert len(manifests) <= 2


def test_the_loop_ends_when_held_out_text_is_modelled_worse(tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(" ".join(grammar(n) for n in range(500, 520)))
    # Without its good texts the corpus models good text worse.
    _, manifests = rounds(
        tmp_path / "a", rounds=9, heldout=str(heldout), high=0.3, low=0.3, max_drop=0.4
    )
    found = [manifest["heldout_bits_per_byte"] for manifest in manifests]
    assert len(found) < 9
    assert found[-1] > found[-2]


def test_verdicts_stand_over_scores(tmp_path: Path) -> None:
    dropped, _ = rounds(tmp_path / "a", rounds=1)
    spared, condemned = sorted(dropped)[0], "good1"
    path = tmp_path / "review.csv"
    path.write_text(f"id,verdict\n{spared},keep\n{condemned},drop\n")
    after, manifests = rounds(tmp_path / "b", rounds=1, verdicts=str(path))
    assert spared not in after
    assert condemned in after
    assert manifests[0]["reasons"]["verdict"] == 1


def test_drift_is_reported(tmp_path: Path) -> None:
    _, manifests = rounds(tmp_path, rounds=1)
    found = manifests[0]
    assert set(found["drop_rates"]) == {"source"}
    assert found["source_divergence_bits"] == pytest.approx(0)
    assert 0 < found["after"]["type_token_ratio"] < 1
    assert found["input_sha256"] != found["kept_sha256"]


def test_a_run_with_rounds_writes_reasons_rounds_and_the_sheet(tmp_path: Path) -> None:
    records = [{"id": text.id, "text": text.text} for text in Texts().texts()]
    write_lines(tmp_path / "in.jsonl", records)
    report = run_clean(
        tmp_path / "in.jsonl",
        tmp_path / "out",
        dedup={"near": False},
        quality={"min_distinct_words": 0.0},
        selfclean={"rounds": 2, "max_drop": 0.2, "order": 4, "review": 20},
    )
    places = where_ids_went(tmp_path / "out")
    assert all(places[f"bad{17 * n}"] == "dropped" for n in range(BAD))
    assert any(record["reason"] == "no_context" for record in read_lines(tmp_path / "out/dropped"))
    assert report["rounds"][0]["documents"] == GOOD + BAD
    with (tmp_path / "out" / "review.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 20
    assert {row["state"] for row in rows} == {"kept", "dropped"}
    assert "Self-cleaning" in (tmp_path / "out" / "report.html").read_text()
