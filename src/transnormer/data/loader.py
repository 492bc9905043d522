"""Batches for training: windows of token streams, in an order that is a function.

A source of n tokens has ceil(n / seq) windows. Window w predicts tokens w seq to (w + 1) seq, each
from the ones before it. What stands before a document's first token is the start token (bos, or eos
in vocabularies without it), also in the middle of a window. The last window ends where the stream
ends, and what the one before has already predicted is ignored there, so that each
token is predicted exactly once an epoch.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transnormer.data.order import Mixture, Rows, hash_key, permute
from transnormer.data.shards import TokenSource
from transnormer.data.tokenizers.base import Tokenizer, start_id

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


class Loader(Rows):
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
            sources: each with its share of the samples.
            seq: tokens of a window.
            batch: windows of a batch, over all ranks.
            seed: another seed, another order.
            packing: "stream" rows run over the ends of documents; "documents" gives cu_seqlens.
        """
        super().__init__(batch)
        if not sources:
            raise ValueError("sources is empty; expected at least one")
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
        self.seq, self.seed = seq, seed
        self.packing: Packing = packing
        self.windows = [num_windows(source, seq) for source in self.sources]
        self._mixture = Mixture([weight for _, weight in sources])

    def locate(self, sample: int) -> tuple[int, int, int]:
        """Return (source, epoch, window) of a global sample index."""
        source, number = self._mixture.locate(sample)
        epoch, place = divmod(number, self.windows[source])
        key = hash_key(self.seed, source, epoch)
        return source, epoch, permute(place, self.windows[source], key)

    def batch(self, step: int) -> Batch:
        """Return batch `step`; any step, in any order, as often as wanted."""
        located = [self.locate(sample) for sample in self.samples(step)]
        return _collate([(self.sources[s], w) for s, _, w in located], self.seq, self.packing)


def label_bytes(batch: Batch, lengths: np.ndarray, tokenizer: Tokenizer) -> int:
    """Return the bytes of text that the labels of a batch stand for.

    Ignored labels and special tokens have none, and a label that begins a document has none for the
    prefix that the tokenizer put there.

    Args:
        batch: of documents of this tokenizer.
        lengths: token_lengths(tokenizer).
        tokenizer: what made the labels.

    nats / ln 2 / label_bytes is bits per byte. The nats of end-of-text tokens belong to it, although
    they have no bytes: a model must also say where a text ends.
    """
    valid = batch.labels != IGNORED
    begins = int((valid & (batch.input_ids == start_id(tokenizer))).sum())
    total = int(lengths[batch.labels[valid].cpu().numpy()].sum())
    return total - begins * len(tokenizer.prefix)


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
