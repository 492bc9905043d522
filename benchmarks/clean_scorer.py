"""Claim: how well the self-cleaning score tells what only a model can tell from clean documents.

One round on part of DATA/en_train.jsonl.xz with those documents of the dirty slice that are clean or
need a model, scored out of fold by the n-gram scorer, or by a model that --run trains. Prints a table;
the last line is JSON, which also goes to benchmarks/results/clean_scorer.json.
"""

import argparse
import json
import lzma
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np

from transnormer.clean.config import SelfCleanConfig
from transnormer.clean.selfclean.loop import Scorer, Text, run_rounds
from transnormer.clean.selfclean.model import ModelScorer
from transnormer.clean.selfclean.ngram import NgramScorer

DOCUMENTS, LABELS, ENGLISH = "dirty_docs.jsonl.xz", "dirty_labels.jsonl.xz", "en_train.jsonl.xz"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of JSON, .xz or plain."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as stream:
        yield from map(json.loads, stream)


class Mixture:
    """Part of the English corpus, and of the slice what is clean or only a model can tell."""

    def __init__(self, data: Path, megabytes: int) -> None:
        self.kinds: list[str] = []
        self._texts: list[Text] = []
        size = 0
        for record in read(data / ENGLISH):
            self._add(record, "corpus", record["source"])
            size += len(record["text"])
            if size >= megabytes * 1_000_000:
                break
        labels = {record["id"]: record for record in read(data / LABELS)}
        for record in read(data / DOCUMENTS):
            label = labels[record["id"]]
            if label.get("needs_model") or label["expected"] == "keep":
                # The name of a source must not tell what is synthetic.
                source = record["source"] if record["source"] != "synthetic" else "unnamed"
                kind = label["label"] if label.get("needs_model") else "clean"
                self._add(record, kind, source)

    def _add(self, record: dict[str, Any], kind: str, source: str) -> None:
        # The corpus has long documents, the slice short ones; strata by length would part them.
        text = record["text"][:4000]
        self._texts.append(Text(len(self._texts), record["id"], text, source, "en"))
        self.kinds.append(kind)

    def texts(self) -> Iterator[Text]:
        """All of them."""
        yield from self._texts


def separation(data: Path, work: Path, megabytes: int, run: Path | None) -> dict[str, Any]:
    """Area under the curve of the first round's severity, each kind against clean documents."""
    mixture = Mixture(data, megabytes)
    start = time.perf_counter()

    def make(number: int, fold: int) -> Scorer:
        return NgramScorer() if run is None else ModelScorer(run, work / f"fold_{fold}")

    gone = run_rounds(mixture, SelfCleanConfig(rounds=1), make, work)
    seconds = time.perf_counter() - start
    with np.load(work / "round_01.npz") as found:
        severities = found["severities"]
    kinds = np.array(mixture.kinds)
    clean = severities[kinds == "clean"]
    areas = {}
    for kind in sorted(set(mixture.kinds) - {"clean", "corpus"}):
        mine = severities[kinds == kind]
        above = (mine[:, None] > clean[None]).mean() + (mine[:, None] == clean[None]).mean() / 2
        areas[kind] = float(above)
    dropped = Counter(mixture.kinds[number] for number in gone)
    return {
        "scorer": "ngram" if run is None else str(run),
        "megabytes": megabytes,
        "seconds": seconds,
        "area": areas,
        "dropped": {kind: dropped[kind] / count for kind, count in Counter(mixture.kinds).items()},
    }


def main() -> None:
    """Score and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="directory of the slice and of en_train.jsonl.xz")
    parser.add_argument("--megabytes", type=int, default=25, help="of English")
    parser.add_argument("--run", type=Path, help="TOML of a training run; default: n-grams")
    parser.add_argument("--work", type=Path, help="keeps the runs; default: a temporary directory")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell it")
    output = harness.RESULTS / "clean_scorer.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    environment = harness.environment(arguments.commit)
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        told = separation(arguments.data, work, arguments.megabytes, arguments.run)
    print_told(told)
    harness.publish({"environment": environment, "selfclean": told}, arguments.output)


def print_told(told: dict[str, Any]) -> None:
    """The table of one separation."""
    rows = [
        (kind, f"{told['area'].get(kind, 0.5):.3f}", f"{100 * share:.1f} %")
        for kind, share in told["dropped"].items()
    ]
    harness.print_table(("kind", "area under the curve", "dropped in one round"), rows)


if __name__ == "__main__":
    main()
