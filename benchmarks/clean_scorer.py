"""Claim: how well the self-cleaning score tells what only a model can tell from clean documents.

One round on part of DATA/en_train.jsonl.xz with those documents of the dirty slice that are clean or
need a model, scored out of fold by the n-gram scorer, or by a model that --run trains. Prints a
table; writes benchmarks/results/clean_scorer.json; the last line is JSON.

    python benchmarks/clean_scorer.py DATA
    python benchmarks/clean_scorer.py carry/clean --run recipes/scorer_tnl.toml --megabytes 60 --minutes 6

carry/clean is what `clean_training.py DATA --pack carry/clean` writes: DATA for another machine.
"""

import argparse
import json
import lzma
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

from transnormer.clean.config import SelfCleanConfig
from transnormer.clean.selfclean.loop import Scorer, Text, run_rounds
from transnormer.clean.selfclean.model import ModelScorer
from transnormer.clean.selfclean.ngram import NgramScorer

# Characters of a text; longer documents are cut.
LONGEST = 4000
DOCUMENTS, LABELS, ENGLISH = "dirty_docs.jsonl.xz", "dirty_labels.jsonl.xz", "en_train.jsonl.xz"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of JSON, .xz or plain."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as stream:
        yield from map(json.loads, stream)


class Mixture:
    """Part of the English corpus, and of the slice what is clean or only a model can tell."""

    def __init__(self, data: Path, megabytes: float) -> None:
        self.kinds: list[str] = []
        self._texts: list[Text] = []
        size = 0
        for record in read(data / ENGLISH):
            # The corpus has long documents, the slice short ones; strata by length would part them.
            for start in range(0, max(1, len(record["text"]) - LONGEST // 4), LONGEST):
                part = {"id": f"{record['id']}/{start}", "text": record["text"][start:][:LONGEST]}
                self._add(part, "corpus", record["source"])
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
        text = record["text"][:LONGEST]
        self._texts.append(Text(len(self._texts), record["id"], text, source, "en"))
        self.kinds.append(kind)

    def texts(self) -> Iterator[Text]:
        """All of them."""
        yield from self._texts


def area(above: np.ndarray, below: np.ndarray) -> float:
    """The probability that one of `above` is larger than one of `below`, ties by half."""
    more = (above[:, None] > below[None]).mean()
    return float(more + (above[:, None] == below[None]).mean() / 2)


def separation(
    data: Path,
    work: Path,
    megabytes: float,
    run: Path | None = None,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Area under the curve of the first round's severity, each kind against clean documents.

    Beside it the areas of what the severity is made of, raw: more bits a byte, less gain.
    """
    mixture = Mixture(data, megabytes)
    start = time.perf_counter()

    def make(number: int, fold: int) -> Scorer:
        return NgramScorer() if run is None else ModelScorer(run, work / f"fold_{fold}", settings)

    gone = run_rounds(mixture, SelfCleanConfig(rounds=1), make, work)
    seconds = time.perf_counter() - start
    with np.load(work / "round_01.npz") as found:
        scores = {"area": found["severities"], "area_bits": found["bits"]}
        scores["area_gain"] = -found["gains"]
    kinds = np.array(mixture.kinds)
    told = sorted(set(mixture.kinds) - {"clean", "corpus"})
    dropped = Counter(mixture.kinds[number] for number in gone)
    return {
        "scorer": "ngram" if run is None else run.stem,
        "settings": list(settings),
        "megabytes": megabytes,
        "texts": len(mixture.kinds),
        "seconds": seconds,
        **{
            name: {kind: area(values[kinds == kind], values[kinds == "clean"]) for kind in told}
            for name, values in scores.items()
        },
        "dropped": {kind: dropped[kind] / count for kind, count in Counter(mixture.kinds).items()},
    }


def main() -> None:
    """Score and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="directory of the slice and of en_train.jsonl.xz")
    parser.add_argument("--megabytes", type=float, default=25, help="of English")
    parser.add_argument("--run", type=Path, help="TOML of a training run; default: n-grams")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, help="for all: a third of it for each training")
    parser.add_argument("--work", type=Path, help="keeps the runs; default: a temporary directory")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell it")
    output = harness.RESULTS / "clean_scorer.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    settings = list(arguments.settings)
    if arguments.minutes:
        # Two folds are trained, and what is left of the time goes to the scores.
        settings.append(f"train.max_minutes={arguments.minutes / 3}")
    environment = harness.gpu_environment(arguments.commit)
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        told = separation(arguments.data, work, arguments.megabytes, arguments.run, settings)
    print_told(told)
    harness.publish({"environment": environment, "selfclean": told}, arguments.output)


def print_told(told: dict[str, Any]) -> None:
    """The table of one separation."""
    areas = ("area", "area_bits", "area_gain")
    rows = [
        (kind, *(f"{told[name].get(kind, 0.5):.3f}" for name in areas), f"{100 * share:.1f} %")
        for kind, share in told["dropped"].items()
    ]
    header = (
        "kind",
        "area under the curve",
        "of bits alone",
        "of gain alone",
        "dropped in a round",
    )
    harness.print_table(header, rows)


if __name__ == "__main__":
    main()
