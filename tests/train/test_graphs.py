"""A step that is captured and replayed: the same losses, and refusals by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from train_cases import Notes

from transnormer.train import RunConfig, backward, run_training
from transnormer.train.graphs import Capture, GraphedBackward, Replay

MakeConfig = Callable[..., RunConfig]


class Recorder:
    """What a CUDA graph does, on a CPU: a replay makes the call again and fills what it gave.

    The gradients that a call makes where there were none lie at the same place in every replay.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.captures, self.replays = parameters, 0, 0

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.captures += 1
        adds = self.parameters[0].grad is not None
        before = [p.grad.clone() for p in self.parameters] if adds else []
        result = call()
        places = [p.grad for p in self.parameters]
        # A capture does nothing: what was computed while recording must not be used.
        result.fill_(torch.nan)
        for place, old in zip(places, before or [torch.tensor(torch.nan)] * len(places)):
            place.copy_(old)

        def replay() -> None:
            self.replays += 1
            for parameter, place in zip(self.parameters, places):
                parameter.grad = place if adds else None
            result.copy_(call())
            for parameter, place in zip(self.parameters, places):
                if parameter.grad is not place:
                    place.copy_(parameter.grad)

        return replay, result


@pytest.mark.parametrize("micro_batch", [2, 4], ids=["two-parts", "one-part"])
def test_replayed_passes_follow_the_plain_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    recorders = []

    def graphed(call: Callable[..., Tensor], model: torch.nn.Module, *rest: object) -> object:
        recorders.append(Recorder([p for p in model.parameters() if p.requires_grad]))
        return GraphedBackward(call, model, torch.device("cpu"), recorders[-1])

    monkeypatch.setattr(backward, "check_graphed", lambda model, device: None)
    monkeypatch.setattr(backward, "cuda_capture", lambda: None)
    monkeypatch.setattr(backward, "GraphedBackward", graphed)
    losses = []
    for name in ("false", "true"):
        config = make_config(
            f"train.cuda_graph={name}",
            f"train.micro_batch={micro_batch}",
            "model.dropout=0",
            "guard.action=skip",
            f"output.dir={tmp_path / name}",
        )
        run_training(config, progress=(notes := Notes()))
        losses.append([(report.loss, report.grad_norm) for report in notes.steps])
    assert losses[0] == losses[1]
    parts = 4 // micro_batch
    # Two calls come before: a whole step of two parts, or two of one.
    assert recorders[0].captures == parts
    assert recorders[0].replays == 6 * parts - 2


def test_a_batch_of_another_shape_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    model = torch.nn.Module()
    model.register_parameter("weight", weight)

    def call(model: torch.nn.Module, batch: tuple[Tensor], divisor: float | Tensor) -> Tensor:
        loss = (batch[0] * weight).sum()
        (loss / divisor).backward()
        return loss.detach()

    capture: Capture = Recorder([weight])
    graphed = GraphedBackward(call, model, torch.device("cpu"), capture)
    for _ in range(3):
        weight.grad = None
        graphed(model, _Part(torch.ones(4)), 2.0)
    weight.grad = None
    with pytest.raises(ValueError, match=r"shape \[5\]; expected \[4\], as the captured one"):
        graphed(model, _Part(torch.ones(5)), 2.0)


class _Part(tuple):
    """A batch of one tensor, as a NamedTuple takes it."""

    def __new__(cls, *parts: Tensor) -> "_Part":
        return super().__new__(cls, parts)


def test_graphs_are_refused_without_a_gpu(make_config: MakeConfig) -> None:
    config = make_config("train.cuda_graph=true", "model.dropout=0")
    with pytest.raises(RuntimeError, match=r"train.cuda_graph is true on the device 'cpu'"):
        run_training(config)
    assert not Path(config.output.dir).exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.packing=documents"], "train.cuda_graph is true with data.packing = 'documents'"),
        (
            ["objective.kind=masked", "model.causal=false"],
            "train.cuda_graph is true with objective.kind = 'masked'",
        ),
        (["train.segment_tokens=4"], "cuda_graph is true beside segment_tokens, 4"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    make_config: MakeConfig, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config("train.cuda_graph=true", *overrides)
