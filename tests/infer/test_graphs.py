"""Decoding steps on a device that is not there: what is asked of which stream."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from transnormer.infer.graphs import Arriving, GraphedStep, StepOutput


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


def test_numbers_have_arrived_when_the_stream_of_their_device_has_come_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded: list[Stream] = []
    event = SimpleNamespace(record=recorded.append)
    host = SimpleNamespace(copy_=lambda values, non_blocking: None)
    monkeypatch.setattr(torch, "empty_like", lambda values, **options: host)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    device = torch.device("cuda", 1)
    Arriving(SimpleNamespace(is_cuda=True, device=device))
    assert [stream.device for stream in recorded] == [device]
