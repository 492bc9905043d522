"""Conversations on the disk, and rows that hold several of them, each with a state of its own."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transnormer.data.chat_template import Encoded
from transnormer.data.loader import IGNORED
from transnormer.data.order import Rows, hash_key, permute

TOKENS, ANSWERS, ENDS = "tokens.npy", "answers.npy", "ends.npy"
TooLong = Literal["cut", "drop", "error"]


class Written(NamedTuple):
    """What became of some conversations.

    Attributes:
        conversations, tokens, answer_tokens: kept.
        cut: of the kept ones, those that lost their end.
        dropped: too long, or without an answer in what would be left.
    """

    conversations: int
    tokens: int
    answer_tokens: int
    cut: int
    dropped: int


def write_conversations(
    encoded: Iterable[tuple[str, Encoded]], directory: Path, *, seq: int, too_long: TooLong
) -> Written:
    """Write conversations into a directory that exists.

    Args:
        encoded: the name of each, for messages, and its tokens, the start token first.
        directory: gets tokens.npy int32 [tokens], answers.npy bool [tokens], and ends.npy int64
            [conversations], where each ends.
        seq: what a row holds: the tokens of a conversation but the last, which is only predicted.
        too_long: longer ones are cut at the end, left out, or raise.

    Raises:
        ValueError: one is too long and too_long is "error"; nothing is left.
    """
    tokens: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    cut = dropped = 0
    for name, (ids, told) in encoded:
        over = len(ids) > seq + 1
        if over and too_long == "error":
            raise ValueError(
                f"{name} has {len(ids)} tokens; expected at most {seq + 1}, data.seq and the one "
                "that is predicted last; raise data.seq, or set objective.too_long"
            )
        kept = told[: seq + 1]
        if (over and too_long == "drop") or not any(kept):
            dropped += 1
            continue
        cut += over
        tokens.append(np.array(ids[: seq + 1], dtype=np.int32))
        answers.append(np.array(kept, dtype=bool))
    if not tokens:
        raise ValueError(
            f"all {dropped} conversations have more than data.seq = {seq} tokens before an answer; "
            "expected some that fit; raise data.seq"
        )
    ends = np.cumsum([len(x) for x in tokens], dtype=np.int64)
    flags = np.concatenate(answers)
    np.save(directory / TOKENS, np.concatenate(tokens))
    np.save(directory / ANSWERS, flags)
    np.save(directory / ENDS, ends)
    return Written(len(tokens), int(ends[-1]), int(flags.sum()), cut, dropped)


class ConversationSource:
    """A directory that write_conversations made, read through memory maps."""

    def __init__(self, directory: Path) -> None:
        """Open it; ValueError names a file that does not agree with the others."""
        arrays = {}
        for name in (TOKENS, ANSWERS, ENDS):
            path = Path(directory) / name
            try:
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(f"{path} cannot be read ({error}); start another run") from None
        self._tokens, self._answers = arrays[TOKENS], arrays[ANSWERS]
        self._ends = np.array(arrays[ENDS])
        if not len(self._tokens) == len(self._answers) == int(self._ends[-1]):
            raise ValueError(
                f"{directory} has {len(self._tokens)} tokens, {len(self._answers)} flags and ends "
                f"at {self._ends[-1]}; expected one number; start another run"
            )

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self._ends)

    @property
    def num_tokens(self) -> int:
        """Tokens of all of them."""
        return len(self._tokens)

    def lengths(self) -> np.ndarray:
        """Positions that each takes in a row, int64 [conversations]: its tokens but the last."""
        return np.diff(self._ends, prepend=0) - 1

    def conversation(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of one, int64 [length]; labels that are no answers are ignored."""
        start = int(self._ends[index - 1]) if index else 0
        tokens = self._tokens[start : self._ends[index]].astype(np.int64)
        answers = self._answers[start : self._ends[index]]
        return tokens[:-1], np.where(answers[1:], tokens[1:], IGNORED)


def pack(lengths: Sequence[int], seq: int) -> list[list[int]]:
    """Put items into rows of at most seq positions; best fit, the longest items first.

    The result depends on the lengths alone. The rows are at most 11/9 of the fewest possible and
    four more (Johnson et al. 1974, best fit decreasing).

    Args:
        lengths: of the items, each 1 to seq.
        seq: what a row holds.

    Returns:
        rows of indices.
    """
    rows: list[list[int]] = []
    # (room, row) of the rows that have any, in order.
    open_rows: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 1 <= length <= seq:
            raise ValueError(f"lengths[{index}] is {length}; expected 1 to {seq}")
        at = bisect_left(open_rows, (length, 0))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = seq, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            insort(open_rows, (room - length, row))
    return rows


class PackedBatch(NamedTuple):
    """Rows of conversations, one behind the other.

    Attributes:
        input_ids: int64 [1, rows * seq].
        labels: int64 [1, rows * seq]; -100 where the next token is no answer.
        cu_seqlens: int32 [num_sequences + 1]: where each conversation begins, and each row's pads,
            which are a sequence of their own.
        tokens: int64 [], without the pads.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    tokens: Tensor


class PackedLoader(Rows):
    """Batches of packed rows in an order that depends on (seed, sample index) alone.

    Sample k of the run is row k mod n of epoch k // n; each epoch has an order of its own. Which
    conversations share a row does not change.
    """

    def __init__(self, source: ConversationSource, *, seq: int, batch: int, seed: int, pad: int):
        """Read a source.

        Args:
            source: the conversations.
            seq: positions of a row.
            batch: rows of a batch, over all ranks.
            seed: another seed, another order.
            pad: the id that fills rows.
        """
        super().__init__(batch)
        self.source, self.seq, self.seed, self.pad = source, seq, seed, pad
        self.rows = pack(source.lengths().tolist(), seq)

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (epoch, row) of a global sample index."""
        epoch, place = divmod(sample, len(self.rows))
        return epoch, permute(place, len(self.rows), hash_key(self.seed, epoch))

    def batch(self, step: int) -> PackedBatch:
        """Return batch `step`; any step, in any order, as often as wanted."""
        return self.collate([self.locate(sample)[1] for sample in self.samples(step)])

    def once(self) -> Iterator[PackedBatch]:
        """Yield all rows once, in their order."""
        for start in range(0, len(self.rows), self.batch_size):
            yield self.collate(range(start, min(start + self.batch_size, len(self.rows))))

    def collate(self, rows: Sequence[int]) -> PackedBatch:
        """Return a batch of these rows."""
        size = len(rows) * self.seq
        inputs = np.full(size, self.pad, dtype=np.int64)
        labels = np.full(size, IGNORED, dtype=np.int64)
        bounds, tokens = [], 0
        for place, row in enumerate(rows):
            at = place * self.seq
            for index in self.rows[row]:
                ids, answers = self.source.conversation(index)
                bounds.append(at)
                inputs[at : at + len(ids)] = ids
                labels[at : at + len(ids)] = answers
                at += len(ids)
                tokens += len(ids)
            if at < (place + 1) * self.seq:
                bounds.append(at)
        return PackedBatch(
            torch.from_numpy(inputs)[None],
            torch.from_numpy(labels)[None],
            torch.tensor([*bounds, size], dtype=torch.int32),
            torch.tensor(tokens),
        )
