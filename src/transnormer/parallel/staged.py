"""A model's and an optimizer's shares, taken at one moment, to be written while they change again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from transnormer.models import checkpoint
from transnormer.parallel.host_copies import HostCopies
from transnormer.parallel.save_shares import save_shares
from transnormer.parallel.shares import Share

T = TypeVar("T")


class StagedShares:
    """What ``Layout.stage`` gives: the shares of this rank by kind of file."""

    def __init__(
        self,
        model: nn.Module,
        shares: Mapping[str, Mapping[str, Share]],
        group: dist.ProcessGroup,
        copies: HostCopies | None,
    ) -> None:
        """Take the shares.

        Args:
            model: whose configuration is written beside them.
            shares: by the stem of the files, then by name.
            group: of all ranks, between hosts' memories; for this alone.
            copies: where to copy the pieces to; None leaves them where they are.
        """
        self._model, self._group, self._copies = model, group, copies
        self._shares = dict(shares)
        if copies is not None:
            taken = copies.take(
                {
                    f"{stem}/{name}/{i}": piece.values
                    for stem, named in shares.items()
                    for name, share in named.items()
                    for i, piece in enumerate(share.pieces)
                }
            )
            for stem, named in shares.items():
                self._shares[stem] = {
                    name: share._replace(
                        pieces=[
                            piece._replace(values=taken[f"{stem}/{name}/{i}"])
                            for i, piece in enumerate(share.pieces)
                        ]
                    )
                    for name, share in named.items()
                }

    def write(self, folder: Path, *, tokenizer_fingerprint: str | None) -> None:
        """Write weights, config.json and the optimizer's state; every rank calls it.

        Raises:
            OSError: some rank cannot write, on all ranks.
        """
        if self._copies is not None:
            self._copies.wait()
        for stem, shares in self._shares.items():
            save_shares(shares, folder, stem, self._group)
        self.from_first(lambda: checkpoint.write_config(self._model, folder, tokenizer_fingerprint))

    def from_first(self, make: Callable[[], T]) -> T:
        """Call a function on the first process; return or raise on all what it did there."""
        return from_first(make, self._group)


def from_first(make: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Call a function on the first process; return or raise on all of a group what it did there."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            dist.broadcast_object_list([None, error], src=0, group=group)
            raise
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
