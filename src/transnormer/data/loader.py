"""Batches for training and evaluation: windows of token streams, in an order that is a function.

A source of n tokens has ceil(n / seq) windows. Window w predicts tokens w seq to (w + 1) seq, each
from the ones before it. What stands before a document's first token is the start token (bos, or eos
in vocabularies without it), also in the middle of a window. The last window ends where the stream
ends, and what the one before has already predicted is ignored there, so that each
token is predicted exactly once an epoch.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transnormer.data.order import Mixture, hash_key, permute
from transnormer.data.shards import TokenSource

IGNORED = -100
Packing = Literal["stream", "documents"]


class Batch(NamedTuple):
    """What a training step needs.

    Attributes:
        input_ids: int64 [batch, seq].
        labels: int64 [batch, seq], the target at each position; -100 is ignored.
        cu_seqlens: None for packing "stream". For "documents" batch is 1, all windows follow each
            other in one row, and this int32 [num_sequences + 1] holds where each piece of a
            document begins, and the row's length.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None


def num_windows(source: TokenSource, seq: int) -> int:
    """Return how many windows of seq tokens a source has.

    Raises ValueError for a seq below 1 and for a source that is shorter than one window.
    """
    if seq < 1:
        raise ValueError(f"data.seq is {seq}; expected at least 1")
    if len(source) < seq:
        raise ValueError(
            f"data {source.name} holds {len(source)} tokens; expected at least {seq}, one window "
            "of data.seq; give more text or lower data.seq"
        )
    return -(-len(source) // seq)


def epoch_weights(sources: Sequence[tuple[TokenSource, float]], seq: int) -> list[float]:
    """Turn epochs of each source into weights: sum(weights) samples then visit all of them so often."""
    return [epochs * num_windows(source, seq) for source, epochs in sources]


class Loader:
    """Samples of weighted sources in an order that depends on (seed, sample index) alone.

    Sample k of the run is row k mod batch of batch k // batch. Every source is read in epochs; each
    epoch visits each window once in an order of its own.
    """

    def __init__(
        self,
        sources: Sequence[tuple[TokenSource, float]],
        *,
        seq: int,
        batch: int,
        seed: int,
        packing: Packing = "stream",
    ) -> None:
        """Mix sources by weight.

        Args:
            sources: each with its share of the samples; for shares by epochs see epoch_weights.
            seq: tokens of a window.
            batch: windows of a batch, over all ranks.
            seed: another seed, another order.
            packing: "stream" rows run over the ends of documents; "documents" gives cu_seqlens.
        """
        if not sources:
            raise ValueError("sources is empty; expected at least one")
        if batch < 1:
            raise ValueError(f"batch is {batch}; expected at least 1")
        if packing not in ("stream", "documents"):
            raise ValueError(f"packing is {packing!r}; expected 'stream' or 'documents'")
        fingerprints = {source.manifest.tokenizer_fingerprint for source, _ in sources}
        if len(fingerprints) > 1:
            names = ", ".join(source.name for source, _ in sources)
            raise ValueError(
                f"sources {names} have {len(fingerprints)} tokenizers; expected one; tokenise them "
                "with the same"
            )
        self.sources = [source for source, _ in sources]
        self.seq, self.batch_size, self.seed = seq, batch, seed
        self.packing: Packing = packing
        self.windows = [num_windows(source, seq) for source in self.sources]
        self._mixture = Mixture([weight for _, weight in sources])
        self._rank, self._world = 0, 1

    def for_rank(self, rank: int, world: int) -> "Loader":
        """Return the loader of one of `world` data-parallel ranks: rows rank, rank + world, ...

        The rows of all ranks together are the rows of this loader, whatever the number of ranks.
        """
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world}; expected 0 <= rank < world")
        if self.batch_size % world:
            raise ValueError(
                f"batch is {self.batch_size} windows; expected a multiple of {world} ranks; change "
                "train.tokens_per_step"
            )
        loader = copy.copy(self)
        loader._rank, loader._world = rank, world
        return loader

    def locate(self, sample: int) -> tuple[int, int, int]:
        """Return (source, epoch, window) of a global sample index."""
        source, number = self._mixture.locate(sample)
        epoch, place = divmod(number, self.windows[source])
        key = hash_key(self.seed, source, epoch)
        return source, epoch, permute(place, self.windows[source], key)

    def batch(self, step: int) -> Batch:
        """Return batch `step`; any step, in any order, as often as wanted."""
        if step < 0:
            raise ValueError(f"step is {step}; expected 0 or more")
        rows = range(self._rank, self.batch_size, self._world)
        located = [self.locate(step * self.batch_size + row) for row in rows]
        return _collate([(self.sources[s], w) for s, _, w in located], self.seq, self.packing)

    def counts(self, steps: int) -> list[int]:
        """Return how many windows of each source the first `steps` batches of all ranks hold."""
        return self._mixture.counts(steps * self.batch_size)


def evaluation_batches(
    source: TokenSource,
    *,
    seq: int,
    batch: int,
    packing: Packing = "stream",
    max_windows: int | None = None,
) -> Iterator[Batch]:
    """Yield each window of a source once, in order; every token is a label exactly once.

    With max_windows the windows are spread evenly over the source. The last batch may have fewer
    rows. A window has no context before it; for scores with the whole document as context carry
    the state instead.
    """
    total = num_windows(source, seq)
    count = total if max_windows is None else min(total, max_windows)
    chosen = [place * total // count for place in range(count)]
    for start in range(0, count, batch):
        windows = [(source, window) for window in chosen[start : start + batch]]
        yield _collate(windows, seq, packing)


def label_bytes(labels: Tensor, lengths: np.ndarray) -> int:
    """Return the bytes of text that the labels stand for.

    Args:
        labels: int64, any shape; -100 and special tokens count nothing.
        lengths: token_lengths(tokenizer).

    nats / ln 2 / label_bytes is bits per byte. The nats of end-of-text tokens belong to it, although
    they have no bytes: a model must also say where a text ends.
    """
    flat = labels.reshape(-1).cpu().numpy()
    return int(lengths[flat[flat != IGNORED]].sum())


def _window(
    source: TokenSource, window: int, seq: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the window's inputs and labels, int64 [seq], and where documents begin in it."""
    nominal = window * seq
    start = min(nominal, len(source) - seq)
    labels = source.tokens(start, start + seq)
    inputs = np.empty_like(labels)
    inputs[1:] = labels[:-1]
    inputs[0] = source.tokens(start - 1, start)[0] if start else source.manifest.start_id
    ends = source.document_ends
    first = np.searchsorted(ends, start, side="left")
    last = np.searchsorted(ends, start + seq, side="left")
    beginnings = ends[first:last] - start
    inputs[beginnings] = source.manifest.start_id
    labels[: nominal - start] = IGNORED
    return inputs, labels, beginnings


def _collate(windows: Sequence[tuple[TokenSource, int]], seq: int, packing: Packing) -> Batch:
    parts = [_window(source, window, seq) for source, window in windows]
    input_ids = torch.from_numpy(np.stack([part[0] for part in parts]))
    labels = torch.from_numpy(np.stack([part[1] for part in parts]))
    if packing == "stream":
        return Batch(input_ids, labels, None)
    starts = [np.union1d([0], part[2]) + row * seq for row, part in enumerate(parts)]
    bounds = np.concatenate([*starts, [len(parts) * seq]]).astype(np.int32)
    return Batch(input_ids.reshape(1, -1), labels.reshape(1, -1), torch.from_numpy(bounds))
