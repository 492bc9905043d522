"""Capturing decoding steps, on a device that is not there."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from transnormer.infer.graphs import GraphedStep, StepOutput


class Stream:
    """A stream that knows its device."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None:
        del other


def test_a_step_is_captured_on_a_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one torch takes the stream of whichever device the process captured on first."""
    steps: list[str] = []
    captures: list[Stream | None] = []

    def step(ids: Tensor, slots: Tensor) -> StepOutput:
        steps.append("captured" if captures else "warm")
        return StepOutput(ids.float(), slots)

    def graph(made: object, pool: object = None, stream: Stream | None = None) -> object:
        del made, pool
        captures.append(stream)
        return nullcontext()

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nullcontext,
        "CUDAGraph": object,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    device = torch.device("meta")
    GraphedStep(step, device)._capture(2, 3)
    assert steps == ["warm"] * 3 + ["captured"]
    (stream,) = captures
    assert stream is not None
    assert stream.device == device
