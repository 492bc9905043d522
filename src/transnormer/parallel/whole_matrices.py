"""Work on whole matrices whose shares lie on several ranks: each goes to one rank and back."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.parallel.shares import Piece, share_of
from transnormer.parallel.tensor_layers import Fused, local

# Where a piece begins in the whole matrix, and its size.
_Block = tuple[tuple[int, ...], tuple[int, ...]]


class _Matrix(NamedTuple):
    """Where one matrix lies.

    Attributes:
        shape: of the whole one.
        blocks: of every rank, in the order of its pieces.
        sends: ranks of a copy, counted within it, whose blocks together are the matrix.
    """

    shape: torch.Size
    blocks: list[list[_Block]]
    sends: list[int]


class MatricesOnRanks:
    """The ``WholeMatrices`` of a layout (``optim.shared_muon``).

    Matrices are dealt out by size, one to each rank in a round. Its shares are sent to that rank by
    the ranks of its own copy of the model, and what becomes of it to all ranks that hold a share, of
    all copies. So each matrix is worked on once, by one rank, and a rank sends and gets no more than
    its shares twice: 1 / ranks of what gathering the parameters costs. A rank holds one whole matrix
    at a time.
    """

    def __init__(
        self,
        fused_of: Callable[[str], Fused | None],
        group: dist.ProcessGroup | None,
        copies: int,
    ) -> None:
        """Take what is known of a layout.

        Args:
            fused_of: how the rows of a parameter lie where layers are shared, by its name.
            group: of all ranks that hold shares; None is all processes.
            copies: of the model among them, each on neighbouring ranks.
        """
        self._fused_of, self._group = fused_of, group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._of_copy = self._ranks // copies
        self._known: dict[str, _Matrix] = {}

    def apply(
        self, shares: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
    ) -> Mapping[str, Tensor]:
        """Call a function with each whole matrix on one rank; see ``WholeMatrices``."""
        if not shares:
            return shares
        pieces = {name: share_of(x, self._fused_of(name)).pieces for name, x in shares.items()}
        like = local(next(iter(shares.values())))
        self._learn(shares, pieces)
        order = sorted(shares, key=lambda name: (-self._known[name].shape.numel(), name))
        for start in range(0, len(order), self._ranks):
            self._round(order[start : start + self._ranks], pieces, like, function)
        return shares

    def _learn(self, shares: Mapping[str, Tensor], pieces: Mapping[str, list[Piece]]) -> None:
        """Find out where matrices lie that were not asked for before."""
        new = sorted(shares.keys() - self._known.keys())
        if not new:
            return
        own = [[(p.offsets, tuple(p.values.shape)) for p in pieces[name]] for name in new]
        told: list[Any] = [None] * self._ranks
        dist.all_gather_object(told, own, group=self._group)
        for index, name in enumerate(new):
            blocks = [of_rank[index] for of_rank in told]
            first = blocks[: self._of_copy]
            # Ranks that hold the same as another one need not send it too.
            sends = [r for r, held in enumerate(first) if held and first.index(held) == r]
            self._known[name] = _Matrix(shares[name].shape, blocks, sends)

    def _round(
        self,
        names: Sequence[str],
        pieces: Mapping[str, list[Piece]],
        like: Tensor,
        function: Callable[[Tensor], Tensor],
    ) -> None:
        """Work on matrix i of some on rank i; what it gives overwrites the pieces.

        like has their dtype and lies where they do.
        """
        every = range(self._ranks)
        own = [[p.values for p in pieces[name]] for name in names]
        given = [x if self._sends(self._rank, i, names) else [] for i, x in enumerate(own)]
        blocks = self._known[names[self._rank]].blocks if self._rank < len(names) else []
        come = [blocks[rank] if self._sends(rank, self._rank, names) else [] for rank in every]
        arrived = self._exchange(given, [_size(of_rank) for of_rank in come], like)
        results: list[list[Tensor]] = []
        if blocks:
            matrix = like.new_empty(self._known[names[self._rank]].shape)
            for of_rank, flat in zip(come, arrived, strict=True):
                for block, values in zip(of_rank, _split(flat, of_rank), strict=True):
                    _inside(matrix, block).copy_(values)
            matrix = function(matrix)
            results = [[_inside(matrix, block) for block in of_rank] for of_rank in blocks]
        held = [self._known[name].blocks[self._rank] for name in names]
        found = self._exchange(results, [_size(of_name) for of_name in held], like)
        for index, of_name in enumerate(held):
            for x, values in zip(own[index], _split(found[index], of_name), strict=True):
                x.copy_(values)

    def _sends(self, rank: int, owner: int, names: Sequence[str]) -> bool:
        """Whether a rank sends its blocks of the matrix that an owner works on."""
        if owner >= len(names):
            return False
        copy, within = divmod(rank, self._of_copy)
        return copy == owner // self._of_copy and within in self._known[names[owner]].sends

    def _exchange(
        self, given: Sequence[Sequence[Tensor]], sizes: Sequence[int], like: Tensor
    ) -> list[Tensor]:
        """Send each rank its tensors; so many entries come from each rank, flat."""
        # Ranks behind the last matrix of a round send and get nothing.
        more = [0] * self._ranks
        sends = [*(sum(x.numel() for x in tensors) for tensors in given), *more][: self._ranks]
        comes = [*sizes, *more][: self._ranks]
        flat = [x.reshape(-1) for tensors in given for x in tensors]
        arrived = like.new_empty(sum(comes))
        sent = torch.cat(flat) if flat else like.new_empty(0)
        dist.all_to_all_single(arrived, sent, comes, sends, group=self._group)
        return list(arrived.split(comes))


def _size(blocks: Sequence[_Block]) -> int:
    return sum(math.prod(shape) for _, shape in blocks)


def _split(flat: Tensor, blocks: Sequence[_Block]) -> list[Tensor]:
    """The blocks that were sent as one row."""
    sizes = [math.prod(shape) for _, shape in blocks]
    return [x.view(shape) for x, (_, shape) in zip(flat.split(sizes), blocks, strict=True)]


def _inside(matrix: Tensor, block: _Block) -> Tensor:
    """A block of a matrix, as a view."""
    offsets, shape = block
    return matrix[tuple(slice(a, a + n) for a, n in zip(offsets, shape, strict=True))]
