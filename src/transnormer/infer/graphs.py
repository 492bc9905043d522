"""CUDA graphs of decoding steps: one for each shape of the batch, replayed with new inputs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
# Runs before a capture: kernels are compiled and libraries choose their algorithms in these.
_WARMUP = 3


class _Graph(NamedTuple):
    """A captured step, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    slots: Tensor
    logits: Tensor


class GraphedStep:
    """A decoding step that is captured once a shape and then replayed; the kernels are the same.

    A step of a constant-size state does the same work at every length of context, so one graph
    for each number of rows and tokens serves all of them. On a CPU the step is simply called.

    Args:
        step: from ids [rows, tokens] and slots int32 [rows] to logits; its outputs and effects
            follow from these and from tensors that stay where they are, it never waits for the
            device, and a slot of -1 has no effect that matters.
        device: where it runs.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._graphs: dict[tuple[int, int], _Graph] = {}
        # Graphs run one after the other, so they may share their scratch memory.
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Run the step; the logits are valid until the next call.

        Args:
            ids: int64 [rows, tokens] on the CPU.
            slots: int32 [rows] on the CPU.
        """
        if self._device.type != "cuda":
            return self._step(ids.to(self._device), slots.to(self._device))
        rows, tokens = ids.shape
        if (rows, tokens) not in self._graphs:
            self._graphs[rows, tokens] = self._capture(rows, tokens)
        graph = self._graphs[rows, tokens]
        graph.ids.copy_(ids, non_blocking=True)
        graph.slots.copy_(slots, non_blocking=True)
        graph.graph.replay()
        return graph.logits

    @torch.no_grad()
    def _capture(self, rows: int, tokens: int) -> _Graph:
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device=self._device)
        # No row is real: what runs now changes no sequence.
        slots = torch.full((rows,), -1, dtype=torch.int32, device=self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                self._step(ids, slots)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._step(ids, slots)
        return _Graph(graph, ids, slots, logits)
