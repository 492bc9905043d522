"""Rounds of the loop: train on the corpus, score out of fold, drop the outliers, report, repeat.

The published scheme (Qin et al. 2023, arXiv:2307.14995, appendix) trains a model on the whole
corpus, keeps what it finds likely enough, and lets people look at a sample; rounds, threshold and
drop rate were not published. Here a document is scored by a model that did not see it, its scores
are compared with those of its likes (`bands`), and what is too likely goes as well as what is too
unlikely. A round drops at most a share of the documents, the most severe first.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from transnormer.clean.arrays import save_arrays
from transnormer.clean.config import SelfCleanConfig
from transnormer.clean.selfclean import review
from transnormer.clean.selfclean.bands import Key, keys_of, make_bands, robust_z
from transnormer.clean.selfclean.drift import Diversity, divergence, drop_rates
from transnormer.clean.selfclean.ngram import Scores
from transnormer.files import read_json, write_atomic

# Characters of the documents that are scored side by side: enough for many full batches of a model.
_GROUP = 1 << 21
UNLIKELY, LIKELY, NO_CONTEXT = "too_unlikely", "too_likely", "no_context"


class Scorer(Protocol):
    """A model of text."""

    def fit(self, texts: Iterable[str]) -> Self:
        """Learn from texts."""
        ...

    def score(self, texts: Sequence[str]) -> list[Scores]:
        """Score texts."""
        ...


class Text(NamedTuple):
    """A document of the corpus as the loop sees it."""

    number: int
    id: str
    text: str
    source: str
    language: str


class Corpus(Protocol):
    """Documents that can be read again and again, in one order."""

    def texts(self) -> Iterator[Text]:
        """Yield all of them."""
        ...


class Judgement(NamedTuple):
    """What a round thinks of its documents, each array [documents] in their order."""

    numbers: np.ndarray
    bits: np.ndarray
    gains: np.ndarray
    severities: np.ndarray
    reasons: list[str]
    bands: dict[str, dict[Key, Any]]


MakeScorer = Callable[[int, int], Scorer]


def _never() -> bool:
    return False


def _untold(line: str) -> None:
    pass


def run_rounds(
    corpus: Corpus,
    config: SelfCleanConfig,
    make_scorer: MakeScorer,
    directory: Path,
    *,
    tell: Callable[[str], None] = _untold,
    stop: Callable[[], bool] = _never,
) -> dict[int, dict[str, Any]]:
    """Run rounds until the rule stops them; return why each document that goes is dropped.

    Args:
        corpus: the documents.
        config: bands, caps and the rule that stops.
        make_scorer: a fresh scorer for a round and a fold.
        directory: for round_NN.json, each written once: a run that goes on reads them.
        tell: is told what is done, with the seconds since the round began.
        stop: asked between groups of documents; once it is True no more are scored: the others
            stay, and the manifest counts those that were scored as its documents.

    The rounds end after config.rounds, or when one drops less than config.min_drop of the
    documents, or when the text of config.heldout is modelled worse than in the round before.
    """
    verdicts = review.read_verdicts(Path(config.verdicts)) if config.verdicts else {}
    gone: dict[int, dict[str, Any]] = {}
    heldout = Path(config.heldout).read_text(encoding="utf-8") if config.heldout else ""
    last: float | None = None
    for number in range(1, config.rounds + 1):
        path = directory / f"round_{number:02d}.json"
        if not path.is_file():
            made, arrays = _Round(
                corpus, config, make_scorer, number, gone, verdicts, heldout, tell, stop
            ).run()
            # Beside the manifest and before it: with the scores other thresholds can be tried.
            save_arrays(path.with_suffix(".npz"), **arrays)
            write_atomic(path, json.dumps(made, indent=1, ensure_ascii=False).encode("utf-8"))
        manifest = read_json(path)
        for entry in manifest["dropped"]:
            gone[entry["number"]] = {
                "step": "selfclean",
                "reason": entry["reason"],
                "round": number,
                "severity": entry["severity"],
            }
        found = manifest["heldout_bits_per_byte"]
        if len(manifest["dropped"]) < config.min_drop * manifest["documents"]:
            break
        if found is not None and last is not None and found > last:
            break
        last = found
    return gone


class _Round:
    def __init__(
        self,
        corpus: Corpus,
        config: SelfCleanConfig,
        make_scorer: MakeScorer,
        number: int,
        gone: dict[int, dict[str, Any]],
        verdicts: dict[str, str],
        heldout: str,
        tell: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> None:
        self._corpus, self._config, self._number = corpus, config, number
        self._make_scorer, self._verdicts, self._heldout = make_scorer, verdicts, heldout
        self._gone, self._tell, self._stop = gone, tell, stop
        self._began = time.perf_counter()

    def run(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the manifest of the round, and the scores of all its documents."""
        scorers = []
        for fold in range(self._config.folds):
            scorers.append(self._make_scorer(self._number, fold).fit(self._without(fold)))
            self._say(f"fold {fold} is fitted")
        judged = self._judge(scorers)
        chosen = self._choose(judged)
        before, after, sources = Diversity(), Diversity(), []
        hashes = {"input": hashlib.sha256(), "kept": hashlib.sha256()}
        dropped = []
        for place, text in enumerate(self._alive()):
            before.add(text.text, text.source)
            hashes["input"].update(f"{text.id}\n{text.text}\n".encode("utf-8", "surrogatepass"))
            if place in chosen:
                sources.append(text.source)
                dropped.append(self._entry(judged, place, text, chosen[place]))
            else:
                after.add(text.text, text.source)
                hashes["kept"].update(f"{text.id}\n".encode("utf-8", "surrogatepass"))
        held = [scorer.score([self._heldout])[0].bits_per_byte for scorer in scorers]
        manifest = {
            "round": self._number,
            "documents": len(judged.numbers),
            "input_sha256": hashes["input"].hexdigest(),
            "kept_sha256": hashes["kept"].hexdigest(),
            "config": self._config.model_dump(mode="json"),
            "heldout_bits_per_byte": float(np.mean(held)) if self._heldout else None,
            "bands": {
                score: {"/".join(map(str, key)) or "all": list(band) for key, band in found.items()}
                for score, found in judged.bands.items()
            },
            "drop_rates": drop_rates(before.sources, sources),
            "reasons": dict(Counter(entry["reason"] for entry in dropped).most_common()),
            "before": before.measures(),
            "after": after.measures(),
            "source_divergence_bits": divergence(before.sources, after.sources),
            "dropped": dropped,
        }
        names = ("numbers", "bits", "gains", "severities")
        return manifest, {name: getattr(judged, name) for name in names}

    def _say(self, what: str) -> None:
        seconds = time.perf_counter() - self._began
        self._tell(f"round {self._number}, {seconds:.1f} s: {what}")

    def _alive(self) -> Iterator[Text]:
        return (text for text in self._corpus.texts() if text.number not in self._gone)

    def _fold(self, text: Text) -> int:
        digest = hashlib.blake2b(text.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest) % self._config.folds

    def _without(self, fold: int) -> Iterator[str]:
        return (text.text for text in self._alive() if self._fold(text) != fold)

    def _judge(self, scorers: list[Scorer]) -> Judgement:
        numbers, bits, gains, keys = [], [], [], []
        for text, scores in self._scored(scorers):
            numbers.append(text.number)
            bits.append(scores.bits_per_byte)
            gains.append(scores.context_gain)
            keys.append(keys_of(text.source, text.language, len(text.text)))
        arrays = {"bits_per_byte": np.array(bits), "context_gain": np.array(gains)}
        bands = {name: make_bands(values, keys) for name, values in arrays.items()}
        z_bits, z_gain = (robust_z(arrays[name], keys, bands[name]) for name in arrays)
        # Both kinds of surprise count together; 1 is the edge of a band.
        unlikely, no_context = np.maximum(z_bits, 0), np.maximum(-z_gain, 0)
        high = (unlikely + no_context) / self._config.high
        low = -z_bits / self._config.low
        reasons = np.where(unlikely >= no_context, UNLIKELY, NO_CONTEXT)
        return Judgement(
            np.array(numbers, dtype=np.int64),
            arrays["bits_per_byte"],
            arrays["context_gain"],
            np.maximum(high, low),
            np.where(low > high, LIKELY, reasons).tolist(),
            bands,
        )

    def _scored(self, scorers: list[Scorer]) -> Iterator[tuple[Text, Scores]]:
        """Every document with its scores out of fold, some of them held at a time."""
        done = 0
        for group in _groups(self._alive()):
            if done and self._stop():
                self._say("stopped")
                return
            found: dict[int, Scores] = {}
            for fold, scorer in enumerate(scorers):
                mine = [text for text in group if self._fold(text) == fold]
                scores = scorer.score([text.text for text in mine])
                found.update((text.number, score) for text, score in zip(mine, scores, strict=True))
            done += len(group)
            self._say(f"{done} documents are scored")
            yield from ((text, found[text.number]) for text in group)

    def _choose(self, judged: Judgement) -> dict[int, str]:
        """The documents to drop by their place in this round, and why."""
        most = int(self._config.max_drop * len(judged.numbers))
        order = np.argsort(-judged.severities, kind="stable")
        out = [int(place) for place in order if judged.severities[place] > 1]
        chosen: dict[int, str] = {}
        scored = islice(self._alive(), len(judged.numbers))
        names = [text.id for text in scored] if self._verdicts else []
        for place in out:
            if len(chosen) < most and not (names and self._verdicts.get(names[place]) == "keep"):
                chosen[place] = judged.reasons[place]
        for place, name in enumerate(names):
            if self._verdicts.get(name) == "drop":
                chosen[place] = "verdict"
        return chosen

    def _entry(self, judged: Judgement, place: int, text: Text, reason: str) -> dict[str, Any]:
        return {
            "number": text.number,
            "id": text.id,
            "reason": reason,
            "severity": round(float(judged.severities[place]), 4),
            "bits_per_byte": round(float(judged.bits[place]), 4),
            "context_gain": round(float(judged.gains[place]), 4),
        }


def _groups(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """The texts in their order, as many at a time as `_GROUP` allows, and at least one."""
    group: list[Text] = []
    size = 0
    for text in texts:
        if group and size + len(text.text) > _GROUP:
            yield group
            group, size = [], 0
        group.append(text)
        # One more for empty texts, which are not free either.
        size += len(text.text) + 1
    if group:
        yield group
