"""A byte n-gram model with a word bigram beside it: the scorer for machines without a GPU.

Bytes: p_n(b | context) = (c(context, b) + strength * p_{n-1}(b)) / (c(context) + strength), from a
uniform p_0 to the highest order (the hierarchical Dirichlet model of MacKay and Peto 1995, with one
strength). Words: the gain of the word before, log2 p(w | v) - log2 p(w), averaged over a document:
text whose words stand in a natural order gains, a shuffled one does not, whatever its vocabulary.
Counts live in tables indexed by hashes; what collides is counted together.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from transnormer.clean.words import mix, split_words

_BATCH = 1 << 20
_COUNT_MOST = np.iinfo(np.uint32).max


class Scores(NamedTuple):
    """What a scorer says of a text.

    Attributes:
        bits_per_byte: of the text under the model.
        context_gain: bits that context saves, a word or, for a model, a byte.
    """

    bits_per_byte: float
    context_gain: float


class NgramScorer:
    """Counts of bytes and words; `fit` may be called again to add more text."""

    def __init__(
        self, order: int = 6, *, table_bits: int = 22, strength: float = 4.0, seed: int = 1
    ) -> None:
        """order: longest run of bytes that is counted; table_bits: log2 of cells a table."""
        self._order, self._strength = order, strength
        self._mask = np.uint64((1 << table_bits) - 1)
        random = np.random.default_rng(seed)
        self._weights = random.integers(0, 1 << 63, order + 2, dtype=np.uint64) * 2 + 1
        # Row n: runs of n + 1 bytes; the last three words, pairs of words.
        self._counts = np.zeros((order, 1 << table_bits), dtype=np.uint32)
        self._words = np.zeros((2, 1 << table_bits), dtype=np.uint32)
        self._num_bytes = self._num_words = 0

    def fit(self, texts: Iterable[str]) -> "NgramScorer":
        """Add texts to the counts."""
        waiting: list[bytes] = []
        size = 0
        for text in texts:
            hashes = split_words(text).hashes
            self._num_words += len(hashes)
            self._add(self._words[0], self._cell(hashes))
            self._add(self._words[1], self._pairs(hashes))
            data = text.encode("utf-8", "surrogatepass")
            waiting.append(data)
            size += len(data)
            if size >= _BATCH:
                self._add_bytes(waiting)
                waiting, size = [], 0
        self._add_bytes(waiting)
        return self

    def score(self, texts: Sequence[str]) -> list[Scores]:
        """Score texts; one without words has no gain, an empty one no bits."""
        return [
            Scores(self._bits(text.encode("utf-8", "surrogatepass")), self._gain(text))
            for text in texts
        ]

    def _add_bytes(self, texts: list[bytes]) -> None:
        # A byte that no text holds keeps the end of one from being the context of the next.
        data = np.frombuffer(b"\xff".join(texts), dtype=np.uint8)
        self._num_bytes += len(data)
        for length, cells in enumerate(self._runs(data)):
            self._add(self._counts[length], cells)

    def _runs(self, data: np.ndarray) -> Iterable[np.ndarray]:
        """Cells of the runs of 1, 2, ... bytes that end at each byte (shorter at the start)."""
        total = np.zeros(len(data), dtype=np.uint64)
        values = data.astype(np.uint64) + np.uint64(1)
        for length in range(self._order):
            total[length:] += values[: max(0, len(data) - length)] * self._weights[length]
            yield self._cell(total + np.uint64(length))

    def _bits(self, data: bytes) -> float:
        if not data or not self._num_bytes:
            return 0.0
        array = np.frombuffer(data, dtype=np.uint8)
        probability = np.full(len(array), 1 / 256)
        context = np.full(len(array), float(self._num_bytes))
        previous: np.ndarray | None = None
        for length, cells in enumerate(self._runs(array)):
            counts = self._counts[length][cells].astype(np.float64)
            if previous is not None:
                # The context of a run is the run without its last byte, which ended one before.
                context = np.concatenate([[0.0], previous[:-1]])
            raised = (counts + self._strength * probability) / (context + self._strength)
            probability = np.minimum(raised, 1.0)
            previous = counts
        return float(-np.log2(probability).mean())

    def _gain(self, text: str) -> float:
        hashes = split_words(text).hashes
        if len(hashes) < 2 or not self._num_words:
            return 0.0
        known = self._words[0][self._cell(hashes)].astype(np.float64)
        alone = (known + 0.5) / (self._num_words + 0.5)
        pairs = self._words[1][self._pairs(hashes)].astype(np.float64)
        # A pair is weighed against as many words at random as its first word was seen.
        strength = 20.0
        after = (pairs + strength * alone[1:]) / (known[:-1] + strength)
        return float(np.log2(after / alone[1:]).mean())

    def _pairs(self, hashes: np.ndarray) -> np.ndarray:
        return self._cell(hashes[:-1] * self._weights[-1] + hashes[1:])

    def _cell(self, values: np.ndarray) -> np.ndarray:
        return (mix(values) & self._mask).astype(np.int64)

    def _add(self, table: np.ndarray, cells: np.ndarray) -> None:
        found, counts = np.unique(cells, return_counts=True)
        room = _COUNT_MOST - table[found]
        table[found] += np.minimum(counts, room).astype(np.uint32)
