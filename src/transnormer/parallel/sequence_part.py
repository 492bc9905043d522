"""How sequences are cut into parts, one a rank, and what a rank must know of the others' parts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.parallel.state_exchange import Chain


class SequencePart(NamedTuple):
    """One rank's tokens of a batch whose sequences are cut along seq.

    Attributes:
        lengths: tokens of each rank's part.
        rank: whose part this is.
        packed: the one row holds packed sequences; else every row is a sequence.
        first_end: where the first sequence of this part ends, counted in this part.
        last_start: where its last sequence begins.
        history: tokens of the first sequence that lie in the parts before.
        future: tokens of the last sequence that lie in the parts behind.
        mask: the whole batch's, bool [batch, sum(lengths)]; None hides nothing.
    """

    lengths: tuple[int, ...]
    rank: int
    packed: bool
    first_end: int
    last_start: int
    history: int
    future: int
    mask: Tensor | None

    @property
    def start(self) -> int:
        """Tokens in the parts before."""
        return sum(self.lengths[: self.rank])

    @property
    def end(self) -> int:
        """Tokens in the parts before and in this one."""
        return sum(self.lengths[: self.rank + 1])

    @property
    def one_sequence(self) -> bool:
        """Whether all tokens of this part belong to one sequence (of each row)."""
        return self.last_start == 0 and self.first_end == self.lengths[self.rank]


class SequenceAxis:
    """What the cores of a model share.

    Attributes:
        chain: the ranks that hold the parts of a sequence.
        overlap: the exchange of states runs beside the attention within the part, whose outputs
            then get the entering state's share by one more product; else it runs before.
        prune: heads with constant decay that forget everything within the shortest part between
            two others, to the accumulation dtype's precision, exchange states with neighbours only.
        part: how the tokens of the current call are cut; None is not at all.
    """

    def __init__(self, chain: Chain, *, overlap: bool = False, prune: bool = True) -> None:
        self.chain, self.overlap, self.prune = chain, overlap, prune
        self.part: SequencePart | None = None


def even_lengths(seq: int, ranks: int) -> tuple[int, ...]:
    """Lengths of as equal parts as there are; the first ones have a token more.

    Raises:
        ValueError: fewer tokens than ranks.
    """
    if seq < ranks:
        raise ValueError(f"seq is {seq}; expected at least one token for each of {ranks} ranks")
    share, more = divmod(seq, ranks)
    return tuple(share + (rank < more) for rank in range(ranks))


def cut(
    seq: int,
    rank: int,
    lengths: Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[SequencePart, Tensor | None]:
    """The part of a rank, and the bounds of the packed sequences in it.

    Args:
        seq: tokens of a whole row.
        rank: whose part.
        lengths: tokens of each rank's part, none of them 0.
        cu_seqlens: bounds of the whole row's sequences; read on the host. Sequences without tokens
            are left out of the part.
        mask: of the whole batch.

    Returns:
        the part, and its own cu_seqlens, int32 on the device of the given ones, or None.

    Raises:
        ValueError: lengths that are not positive, or do not add up to seq.
    """
    if sum(lengths) != seq or min(lengths, default=0) < 1:
        raise ValueError(
            f"lengths is {list(lengths)}; expected positive numbers whose sum is {seq}, the tokens "
            "of a row"
        )
    start = sum(lengths[:rank])
    end = start + lengths[rank]
    whole = [0, seq] if cu_seqlens is None else sorted(set(cu_seqlens.tolist()))
    inside = sorted({min(max(bound, start), end) - start for bound in whole})
    part = SequencePart(
        lengths=tuple(lengths),
        rank=rank,
        packed=cu_seqlens is not None,
        first_end=inside[1],
        last_start=inside[-2],
        history=start - max(bound for bound in whole if bound <= start),
        future=min(bound for bound in whole if bound >= end) - end,
        mask=mask,
    )
    if cu_seqlens is None:
        return part, None
    return part, torch.tensor(inside, dtype=torch.int32, device=cu_seqlens.device)
