"""Claim: how well the self-cleaning score tells what only a model can tell from clean documents.

One round on part of DATA/en_train.jsonl.xz with those documents of the dirty slice that are clean or
need a model, scored out of fold by the n-gram scorer, or by a model that --run trains. Prints a
table; writes benchmarks/results/clean_scorer.json; the last line is JSON.

    python benchmarks/clean_scorer.py DATA
    python benchmarks/clean_scorer.py carry/clean --run recipes/scorer_tnl.toml --megabytes 60 --minutes 8

carry/clean is what `clean_training.py DATA --pack carry/clean` writes: DATA for another machine.
With --minutes a few steps and scores are timed first, once all kernels are compiled, and both models
are trained for equal steps that leave time for the scores. The slice is scored first; what is not
scored when the time ends is left out, and `scored` says how many documents are in the figures.
"""

import argparse
import json
import lzma
import math
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
from transnormer.train.metrics import Quiet, StepReport
from transnormer.train.recipe import read_run

# Characters of a text; longer documents are cut.
LONGEST = 4000
# Documents of a kind below which its areas say nothing.
FEWEST = 20
# Of the time that is left after the timing, what each of the two trainings may take.
TRAINING_SHARE = 0.35
# Steps that are timed, the first of them not, and characters of their texts.
TIMED, UNTIMED, TIMED_TEXT = 16, 6, 2_000_000
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
        # The slice first: what is scored before the time ends holds all of it.
        labels = {record["id"]: record for record in read(data / LABELS)}
        records = list(read(data / DOCUMENTS))
        kept = [x for x in records if labels[x["id"]]["expected"] == "keep"]
        sources, draws = [x["source"] for x in kept], np.random.default_rng(0)
        for record in records:
            label = labels[record["id"]]
            if label.get("needs_model") or label["expected"] == "keep":
                source = record["source"]
                if source == "synthetic":
                    # Hidden among the clean ones: as a source of their own they would be judged
                    # among themselves.
                    source = sources[draws.integers(len(sources))]
                kind = label["label"] if label.get("needs_model") else "clean"
                self._add(record, kind, source)
        size = 0
        for record in read(data / ENGLISH):
            # The corpus has long documents, the slice short ones; strata by length would part them.
            for start in range(0, max(1, len(record["text"]) - LONGEST // 4), LONGEST):
                part = {"id": f"{record['id']}/{start}", "text": record["text"][start:][:LONGEST]}
                self._add(part, "corpus", record["source"])
            size += len(record["text"])
            if size >= megabytes * 1_000_000:
                break

    def _add(self, record: dict[str, Any], kind: str, source: str) -> None:
        text = record["text"][:LONGEST]
        self._texts.append(Text(len(self._texts), record["id"], text, source, "en"))
        self.kinds.append(kind)

    def texts(self) -> Iterator[Text]:
        """All of them."""
        yield from self._texts

    def head(self, characters: int) -> list[str]:
        """The first texts, of about so many characters."""
        ends = np.cumsum([len(text.text) for text in self._texts])
        return [text.text for text in self._texts[: np.searchsorted(ends, characters) + 1]]


class Watch(Quiet):
    """Prints where a run is."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.seconds: list[float] = []

    def message(self, text: str) -> None:
        """Print it."""
        print(f"{self._name}: {text}", flush=True)

    def step(self, report: StepReport, steps: int) -> None:
        """Print some of them."""
        self.seconds.append(report.seconds)
        if report.step in (1, steps) or report.step % 50 == 0:
            self.message(f"step {report.step} of {steps}, {report.seconds:.1f} s")


def fitting_settings(
    run: Path, settings: Sequence[str], texts: Sequence[str], work: Path, deadline: float
) -> list[str]:
    """The settings with as many steps as a training may take, of the run's, timed here.

    The first steps and scores compile kernels: here, since the first fold would pay for both.
    """
    short = [*settings, f"train.steps={TIMED}", "optimizer.warmup=0"]
    watch = Watch("timing")
    ModelScorer(run, work / "timing", short, watch).fit(texts).score(texts[:256])
    took = watch.seconds[-1] - watch.seconds[UNTIMED - 1]
    left = deadline - time.perf_counter()
    fitting = int(TRAINING_SHARE * left * (TIMED - UNTIMED) / took)
    wanted = read_run(run, [*settings, f'data.path="{work}"', f'output.dir="{work}"'])
    steps = min(wanted.train.steps, fitting)
    watch.message(f"{left:.0f} s are left; {fitting} steps fit in each training, {steps} are made")
    if steps <= wanted.optimizer.warmup:
        raise RuntimeError(
            f"{fitting} steps fit in each training; expected more than the warm-up's "
            f"{wanted.optimizer.warmup}; give more --minutes"
        )
    return [*settings, f"train.steps={steps}"]


def area(above: np.ndarray, below: np.ndarray) -> float:
    """The probability that one of `above` is larger than one of `below`, ties by half."""
    more = (above[:, None] > below[None]).mean()
    return float(more + (above[:, None] == below[None]).mean() / 2)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def separation(
    data: Path,
    work: Path,
    megabytes: float,
    run: Path | None = None,
    settings: Sequence[str] = (),
    minutes: float | None = None,
) -> dict[str, Any]:
    """Area under the curve of the first round's severity, each kind against clean documents.

    Beside it the areas of what the severity is made of, raw: more bits a byte, less gain.
    Raises RuntimeError when `minutes` end before enough documents of each kind are scored.
    """
    start = time.perf_counter()
    deadline = math.inf if minutes is None else start + 60 * minutes
    mixture = Mixture(data, megabytes)
    if run is not None and minutes is not None:
        few = mixture.head(TIMED_TEXT)
        settings = fitting_settings(run, settings, few, work, deadline)

    def make(number: int, fold: int) -> Scorer:
        if run is None:
            return NgramScorer()
        return ModelScorer(run, work / f"fold_{fold}", settings, Watch(f"fold {fold}"))

    def over() -> bool:
        return time.perf_counter() >= deadline

    gone = run_rounds(mixture, SelfCleanConfig(rounds=1), make, work, tell=say, stop=over)
    seconds = time.perf_counter() - start
    with np.load(work / "round_01.npz") as found:
        scores = {"area": found["severities"], "area_bits": found["bits"]}
        scores["area_gain"] = -found["gains"]
        kinds = np.array(mixture.kinds)[found["numbers"]]
    counts = Counter(kinds.tolist())
    told = sorted(set(mixture.kinds) - {"clean", "corpus"})
    for kind in (*told, "clean"):
        if counts[kind] < min(FEWEST, mixture.kinds.count(kind)):
            raise RuntimeError(
                f"{counts[kind]} documents of the kind {kind!r} were scored when the time ended; "
                f"expected {FEWEST}; give more --minutes or less --megabytes"
            )
    dropped = Counter(mixture.kinds[number] for number in gone)
    return {
        "scorer": "ngram" if run is None else run.stem,
        "settings": list(settings),
        "megabytes": megabytes,
        "texts": len(mixture.kinds),
        "scored": len(kinds),
        "seconds": seconds,
        **{
            name: {kind: area(values[kinds == kind], values[kinds == "clean"]) for kind in told}
            for name, values in scores.items()
        },
        "dropped": {kind: dropped[kind] / count for kind, count in counts.items()},
    }


def main() -> None:
    """Score and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="directory of the slice and of en_train.jsonl.xz")
    parser.add_argument("--megabytes", type=float, default=25, help="of English")
    parser.add_argument("--run", type=Path, help="TOML of a training run; default: n-grams")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, help="for all; the steps are fitted to it")
    parser.add_argument("--work", type=Path, help="keeps the runs; default: a temporary directory")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell it")
    output = harness.RESULTS / "clean_scorer.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    environment = harness.gpu_environment(arguments.commit)
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        told = separation(
            arguments.data,
            work,
            arguments.megabytes,
            arguments.run,
            arguments.settings,
            arguments.minutes,
        )
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
