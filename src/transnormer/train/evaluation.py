"""Held-out texts scored by a function that the trainer is handed, and stopped by a signal."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol, TypeVar

import torch

from transnormer.data import Tokenizer
from transnormer.models.checkpoint import AnyModel
from transnormer.models.decoder import Decoder
from transnormer.train.precision import autocast_for
from transnormer.train.signals import Stop

ModelT = TypeVar("ModelT", bound=AnyModel)
FoundT = TypeVar("FoundT")


class Evaluation(Protocol):
    """What an evaluation finds: sums over the text, and means in nats and in bits."""

    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def nats_per_token(self) -> float: ...
    @property
    def bits_per_byte(self) -> float: ...


class Evaluate(Protocol):
    """Scores texts with a model; calls progress with the tokens just scored, every so often."""

    def __call__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluation: ...


class _Stopped(Exception):
    """Leaves an evaluation from within."""


def evaluate_until(
    stop: Stop,
    evaluate: Callable[[ModelT, Callable[[int], None]], FoundT],
    model: ModelT,
    *,
    compiled: bool = False,
    precision: str = "float32",
) -> FoundT | None:
    """Score a model in eval mode; None where a signal asks to stop before all is scored.

    Random numbers that the evaluation draws change nothing for the run. A compiled model runs
    uncompiled here: each length of text would cost a graph of its own. precision is that of a model
    whose parameters are gathered in it.
    """

    def check(tokens: int) -> None:
        if stop() is not None:
            raise _Stopped

    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    plain = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    rounded = autocast_for(precision, device) or nullcontext()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), plain, rounded:
            return evaluate(model.eval(), check)
    except _Stopped:
        return None
