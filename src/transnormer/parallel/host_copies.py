"""Copies of tensors in the host's memory, which a checkpoint is written from while training goes on."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Bytes of one piece of memory, unless a tensor needs more: torch rounds pinned memory up to a power
# of two, so that one piece for all, or one a tensor, could take twice as much as is needed.
_PIECE = 1 << 30
# Bytes at whose multiples copies begin: wider than any entry, and than a line of a cache.
_ALIGNED = 256


class HostCopies:
    """Copies that keep their memory from one time to the next.

    What lies on a GPU is copied into pinned memory by a stream of its own, behind the work that the
    device already has and beside what it is given next; nothing on the host waits but ``wait``. What
    changes a source comes behind ``hold``.

    Attributes:
        used: whether copies were ever taken.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.used = False
        self._copies: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors by name; the copies that these names had before are overwritten.

        Memory is asked for where a name has none of the right size: the first time, for all at once.

        Raises:
            RuntimeError: the host has no room for the copies.
        """
        self.used = True
        self._reserve(tensors)
        there = {name: x.detach() for name, x in tensors.items() if x.is_cuda}
        for name, x in tensors.items():
            if name not in there:
                self._copies[name].copy_(x)
        if there:
            self._enqueue(there)
        return {name: self._copies[name] for name in tensors}

    def _enqueue(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what lies on the GPU, when what computes it has run."""
        device = next(iter(tensors.values())).device
        if self._stream is None or self._done is None:
            self._stream, self._done = torch.cuda.Stream(device), torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for name, x in tensors.items():
                self._copies[name].copy_(x, non_blocking=True)
                # Merged weights are gone before they are copied: their memory must not be.
                x.record_stream(self._stream)
            self._done.record()

    def hold(self) -> None:
        """Let the device wait for the copies with all that it is given from now on."""
        if self._stream is not None and self._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)

    def wait(self) -> None:
        """Wait until all copies have arrived."""
        if self._done is not None:
            self._done.synchronize()

    def _reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Get memory for the tensors that have none."""
        for pinned in (False, True):
            new = {
                name: x
                for name, x in tensors.items()
                if x.is_cuda is pinned and not _fits(self._copies.get(name), x)
            }
            sizes = {name: x.numel() * x.element_size() for name, x in new.items()}
            lengths, places = packed(sizes, _PIECE)
            try:
                pieces = [torch.empty(n, dtype=torch.uint8, pin_memory=pinned) for n in lengths]
            except RuntimeError as error:
                raise RuntimeError(
                    f"train.save_async is true and the host has no room for copies of "
                    f"{sum(sizes.values()) / 1e9:.1f} GB in each process; expected that much beside "
                    f"what it holds; set it to false ({error})"
                ) from error
            for name, (piece, start) in places.items():
                values = pieces[piece][start : start + sizes[name]].view(new[name].dtype)
                self._copies[name] = values.view(new[name].shape)


def _fits(copy: Tensor | None, x: Tensor) -> bool:
    return copy is not None and copy.shape == x.shape and copy.dtype == x.dtype


def packed(sizes: Mapping[str, int], most: int) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Places for so many bytes by name in few pieces of memory.

    Args:
        sizes: bytes.
        most: bytes of a piece, where one name does not need more.

    Returns:
        the pieces' bytes, and each name's piece and first byte in it.
    """
    taken = {name: -(-size // _ALIGNED) * _ALIGNED for name, size in sizes.items()}
    left = sum(taken.values())
    lengths: list[int] = []
    ends: list[int] = []
    places: dict[str, tuple[int, int]] = {}
    # The large ones first: what is left of a piece then holds small ones.
    for name in sorted(taken, key=lambda n: (-taken[n], n)):
        size = taken[name]
        piece = next((i for i, end in enumerate(ends) if lengths[i] - end >= size), None)
        if piece is None:
            piece = len(lengths)
            lengths.append(max(size, min(most, left)))
            ends.append(0)
        places[name] = piece, ends[piece]
        ends[piece] += size
        left -= size
    return lengths, places
