"""Which documents repeat others: equal ones, near ones found by MinHash, and contained ones.

Near duplicates are candidates that share a band, verified one by one: the exact Jaccard index of
their shingles must reach the threshold. Verified pairs link documents to clusters. The first
document of a cluster in the order of the input is kept, and of the others those at or above
`keep_below` to it are dropped; the first of what is left is kept next, and so on, so that no chain
of small changes drops a text that is unlike the one that stays.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
from datatrove.pipeline.base import PipelineStep

from transnormer.clean.config import DedupConfig
from transnormer.clean.index import Index, unit_name
from transnormer.clean.item import Item
from transnormer.clean.words import jaccard, shingle_set
from transnormer.files import write_atomic

# All pairs of so many documents with one band are candidates, of more each with the last so many.
_ALL_PAIRS = 32
_CACHED_SHINGLES = 8 << 20
_FEWEST_SAMPLED = 4
# A sample finds candidates for containment; it may fall short of the share that is asked for.
_SAMPLE_SLACK = 0.7

Why = dict[str, Any]


class FindDuplicates(PipelineStep):
    """One task over all units: writes NNNNN.json, for each document to drop its number and why."""

    type = "dedup"
    name = "duplicates"

    def __init__(self, indexed: Path, found: Path, units: int, config: DedupConfig) -> None:
        super().__init__()
        self._indexed, self._found, self._units = indexed, found, units
        self._config = config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Item]:
        """Find and write; nothing is passed on."""
        index = Index(self._indexed, self._units)
        search = _Documents(index, self._config)
        removed: list[dict[str, Why]] = [{} for _ in range(self._units)]
        for number, why in search.run().items():
            unit, place = index.place(number)
            removed[unit][str(place)] = why
        for unit, found in enumerate(removed):
            write_atomic(self._found / f"{unit_name(unit)}.json", orjson.dumps(found))
        self.stat_update("candidates", value=search.num_candidates)
        self.stat_update("verified", value=search.num_verified)
        counts = {"candidates": search.num_candidates, "verified": search.num_verified}
        write_atomic(self._found / "counts.json", orjson.dumps(counts))
        yield from ()


class Searched(Protocol):
    """A list of texts with what the search needs of each."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def column(self, name: str, place: int | None = None) -> np.ndarray:
        """One array of all texts, or one column of it."""
        ...

    def text(self, number: int) -> str:
        """One of them."""
        ...

    def name(self, number: int) -> str:
        """The id of its document."""
        ...


class Search:
    """The search for duplicates among texts; those of `gone` are no candidates."""

    def __init__(self, index: Searched, config: DedupConfig, gone: Iterable[int] = ()) -> None:
        self._index, self._config = index, config
        self._alive = np.ones(len(index), dtype=bool)
        self._alive[list(gone)] = False
        self._kept_as: dict[int, int] = {}
        self._whys: dict[int, Why] = {}
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached = 0
        self.num_candidates = self.num_verified = 0

    def run(self) -> dict[int, Why]:
        """Return why each document that repeats another is dropped."""
        if not len(self._index):
            return {}
        if self._config.exact:
            self._exact()
        if self._config.near:
            self._near()
        return self._whys

    def drop(self, number: int, reason: str, kept: int, similarity: float) -> None:
        """Note that a text is dropped for one that is kept."""
        self._kept_as[number] = kept
        self._whys[number] = {
            "step": "duplicates",
            "reason": reason,
            "duplicate_of": self._index.name(kept),
            "similarity": round(similarity, 4),
        }

    def _exact(self) -> None:
        groups = self._alike("digests", 0, self._alive)
        if not groups:
            return
        rest = self._index.column("digests", 1)
        for group in groups:
            for value in np.unique(rest[group]):
                first, *others = map(int, group[rest[group] == value])
                for number in others:
                    self.drop(number, "exact", first, 1.0)

    def _alike(self, name: str, place: int, alive: np.ndarray) -> list[np.ndarray]:
        """Groups of texts with one value in a column, each in the order of the input.

        Little more than the column is in memory: at most 48 bytes a text.
        """
        numbers = np.flatnonzero(alive)
        keys = self._index.column(name, place)[numbers]
        # A stable sort, so that the first of a group is the first of the input.
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        same = keys[1:] == keys[:-1]
        del keys
        return [group.copy() for group in _runs(numbers[order], same)]

    def _near(self) -> None:
        links: dict[int, set[int]] = defaultdict(set)
        known: dict[tuple[int, int], float] = {}
        for a, b in self._candidates():
            self.num_candidates += 1
            similarity = jaccard(self._shingles(a), self._shingles(b))
            if similarity >= self._config.jaccard:
                self.num_verified += 1
                links[a].add(b)
                links[b].add(a)
                known[a, b] = similarity
        for cluster in _components(links):
            self._thin(cluster, known)

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """Pairs (lower, higher) of documents that share a band, each once, sorted."""
        alive = self._alive.copy()
        alive[list(self._kept_as)] = False
        pairs: list[np.ndarray] = []
        for band in range(self._config.bands):
            pairs += [_pairs(group) for group in self._alike("bands", band, alive)]
            if len(pairs) > 1:
                pairs = [np.unique(np.concatenate(pairs), axis=0)]
        for a, b in pairs[0] if pairs else ():
            yield int(a), int(b)

    def _thin(self, cluster: list[int], known: dict[tuple[int, int], float]) -> None:
        left = cluster
        while left:
            kept, others = left[0], left[1:]
            left = []
            for other in others:
                similarity = known.get((kept, other))
                if similarity is None:
                    similarity = jaccard(self._shingles(kept), self._shingles(other))
                if similarity >= self._config.keep_below:
                    self.drop(other, "near", kept, similarity)
                else:
                    left.append(other)

    def _shingles(self, number: int) -> np.ndarray:
        """A document's shingles; the last ones used stay in memory."""
        found = self._cache.pop(number, None)
        if found is None:
            found = shingle_set(self._index.text(number), self._config.shingle_words)
            self._cached += len(found)
        self._cache[number] = found
        while self._cached > _CACHED_SHINGLES and len(self._cache) > 2:
            self._cached -= len(self._cache.popitem(last=False)[1])
        return found


class _Documents(Search):
    """Documents may also be contained in others."""

    def __init__(self, index: Index, config: DedupConfig) -> None:
        super().__init__(index, config)
        self._documents = index

    def run(self) -> dict[int, Why]:
        """Return why each document that repeats others is dropped."""
        super().run()
        if self._config.containment and len(self._documents):
            self._contained()
        return self._whys

    def _contained(self) -> None:
        """Drop documents whose shingles stand, for the most part, in earlier ones."""
        hashes, owners = self._documents.sampled()
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        first = np.concatenate([[True], hashes[1:] != hashes[:-1]])
        first_owner = owners[np.maximum.accumulate(np.where(first, np.arange(len(owners)), 0))]
        totals = np.bincount(owners, minlength=len(self._index))
        shared = np.bincount(owners[first_owner < owners], minlength=len(self._index))
        likely = (totals >= _FEWEST_SAMPLED) & (
            shared >= self._config.containment * _SAMPLE_SLACK * totals
        )
        by_owner = np.argsort(owners, kind="stable")
        starts = np.searchsorted(owners[by_owner], np.arange(len(self._index) + 1))
        for number in map(int, np.flatnonzero(likely)):
            if number in self._kept_as:
                continue
            mine = first_owner[by_owner[starts[number] : starts[number + 1]]]
            self._check_contained(number, [int(owner) for owner in mine if owner < number])

    def _check_contained(self, number: int, owners: list[int]) -> None:
        votes: dict[int, int] = defaultdict(int)
        for owner in owners:
            votes[self._kept_as.get(owner, owner)] += 1
        best = sorted(votes, key=lambda owner: -votes[owner])[:_ALL_PAIRS]
        mine = self._shingles(number)
        if not best or not len(mine):
            return
        others = np.unique(np.concatenate([self._shingles(owner) for owner in best]))
        share = len(np.intersect1d(mine, others, assume_unique=True)) / len(mine)
        if share >= self._config.containment:
            self.drop(number, "contained", best[0], share)


def _runs(values: np.ndarray, same: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of two values and more; same[i] says that value i + 1 goes with value i."""
    edges = np.diff(np.concatenate([[0], same.astype(np.int8), [0]]))
    for start, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
        yield values[start : end + 1]


def _pairs(group: np.ndarray) -> np.ndarray:
    """Candidate pairs of the documents of a run, int64 [pairs, 2], the lower number first."""
    if len(group) <= _ALL_PAIRS:
        a, b = np.triu_indices(len(group), 1)
    else:
        b = np.repeat(np.arange(1, len(group)), _ALL_PAIRS)
        a = b - np.tile(np.arange(1, _ALL_PAIRS + 1), len(group) - 1)
        # The first of all is the one that will be kept.
        a = np.maximum(a, 0)
    return np.stack([group[a], group[b]], axis=1)


def _components(links: dict[int, set[int]]) -> Iterator[list[int]]:
    """Connected documents, sorted."""
    seen: set[int] = set()
    for start in sorted(links):
        if start in seen:
            continue
        found, stack = [], [start]
        seen.add(start)
        while stack:
            number = stack.pop()
            found.append(number)
            for other in links[number] - seen:
                seen.add(other)
                stack.append(other)
        yield sorted(found)
