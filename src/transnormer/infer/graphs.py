"""CUDA graphs of decoding steps: one for each shape of the batch, replayed with new inputs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class StepOutput(NamedTuple):
    """What a decoding step gives; valid until the next one.

    Attributes:
        logits: [rows, tokens, vocab_size].
        likeliest: int64 [2, rows, tokens]: the likeliest token after each, and 1 where the largest
            logit is NaN or infinite; None where the step does not look.
    """

    logits: Tensor
    likeliest: Tensor | None


class Arriving:
    """Numbers on their way to the host, from a device that goes on with what follows them."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            # Of their device, which need not be the current one.
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[list[int]]:
        """Wait for them alone."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


Step = Callable[[Tensor, Tensor], StepOutput]
# Runs before a capture: kernels are compiled and libraries choose their algorithms in these.
_WARMUP = 3


class _Graph(NamedTuple):
    """A captured step, what it reads (ids, then slots, in one tensor), and what it gives."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    output: StepOutput


class GraphedStep:
    """A decoding step that is captured once a shape and then replayed; the kernels are the same.

    A step of a constant-size state does the same work at every length of context, so one graph
    for each number of rows and tokens serves all of them. On a CPU the step is simply called.

    Args:
        step: from ids [rows, tokens], int64 or int32, and slots int32 [rows] to its output; outputs
            and effects follow from these and from tensors that stay where they are, it never waits
            for the device, and a slot of -1 has no effect that matters.
        device: where it runs.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._graphs: dict[tuple[int, int], _Graph] = {}
        # Graphs run one after the other, so they may share their scratch memory.
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, ids: Tensor, slots: Tensor) -> StepOutput:
        """Run the step; what it gives is valid until the next call.

        Args:
            ids: int64 [rows, tokens] on the CPU, or on the device, for which nothing is waited.
            slots: int32 [rows] on the CPU.
        """
        if self._device.type != "cuda":
            return self._step(ids.to(self._device), slots.to(self._device))
        rows, tokens = ids.shape
        if (rows, tokens) not in self._graphs:
            self._graphs[rows, tokens] = self._capture(rows, tokens)
        graph = self._graphs[rows, tokens]
        if ids.is_cuda:
            graph.inputs[: rows * tokens].copy_(ids.flatten())
            graph.inputs[rows * tokens :].copy_(slots.pin_memory(), non_blocking=True)
        else:
            # One copy for both: each costs the host as much as some kernels cost the device.
            given = torch.cat([ids.flatten().to(torch.int32), slots])
            graph.inputs.copy_(given, non_blocking=True)
        graph.graph.replay()
        return graph.output

    def again(self, rows: int, tokens: int) -> None:
        """Run the step of a shape on what it was given last: what the device does, for a clock.

        Raises:
            ValueError: no step of this shape has run on a GPU.
        """
        if (rows, tokens) not in self._graphs:
            raise ValueError(
                f"no graph of {rows} rows and {tokens} tokens; expected one of {[*self._graphs]}"
            )
        self._graphs[rows, tokens].graph.replay()

    @torch.no_grad()
    def _capture(self, rows: int, tokens: int) -> _Graph:
        inputs = torch.zeros(rows * (tokens + 1), dtype=torch.int32, device=self._device)
        ids, slots = inputs[: rows * tokens].view(rows, tokens), inputs[rows * tokens :]
        # No row is real: what runs now changes no sequence.
        slots.fill_(-1)
        stream, graph = torch.cuda.Stream(self._device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                self._step(ids, slots)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        # Its own stream: torch's for captures lies on the device of the process's first one.
        with torch.cuda.graph(graph, pool=self._memory, stream=stream):
            output = self._step(ids, slots)
        return _Graph(graph, inputs, output)
