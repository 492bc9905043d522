"""Copies of tensors in the host's memory, which a checkpoint is written from while training goes on."""

import torch
from torch import Tensor


class HostCopies:
    """Copies that keep their memory from one time to the next.

    What lies on a GPU is copied into pinned memory by the GPU, behind the work it already has and
    before what it is given next; nothing waits but ``wait``.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._buffers: dict[str, Tensor] = {}
        self._done: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, name: str, x: Tensor) -> Tensor:
        """Copy a tensor; the copy that this name had before is overwritten."""
        x = x.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != x.shape or buffer.dtype != x.dtype:
            buffer = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(x, non_blocking=x.is_cuda)
        if x.is_cuda:
            if self._done is None:
                self._done = torch.cuda.Event()
            self._done.record()
        return buffer

    def wait(self) -> None:
        """Wait until all copies have arrived."""
        if self._done is not None:
            self._done.synchronize()
