"""Causal language modelling: every token from those before it."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from transnormer.data import Batch, label_bytes, token_lengths
from transnormer.models.decoder import Decoder
from transnormer.train.metrics import Headline
from transnormer.train.objectives.base import Counts, Setting
from transnormer.train.objectives.windows import WindowObjective


class EvaluationReport(NamedTuple):
    """One evaluation on the held-out part after `step` updates; loss in nats per token."""

    step: int
    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    seconds: float

    def headline(self) -> Headline:
        """Bits per byte."""
        return Headline("bits per byte", self.bits_per_byte)

    def describe(self) -> str:
        """What was found, as words."""
        return (
            f"loss {self.loss:.4f}  {self.bits_per_byte:.3f} bits per byte  ({self.bytes:,} bytes)"
        )


class CausalObjective(WindowObjective):
    """The negative log-likelihood of every token, in nats."""

    report = EvaluationReport
    scores_text: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._evaluate = setting.evaluate
        self._lengths = token_lengths(self.tokenizer)

    @property
    def has_heldout(self) -> bool:
        return self._evaluate is not None and bool(self.heldout)

    def counts(self, batch: Batch) -> Counts:
        text_bytes = label_bytes(batch, self._lengths, self.tokenizer)
        return super().counts(batch)._replace(text_bytes=text_bytes)

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        return model.loss(
            batch.input_ids, batch.labels, reduction="sum", cu_seqlens=batch.cu_seqlens
        )

    def evaluate(self, model: Decoder, check: Callable[[int], None]) -> dict[str, Any]:
        assert self._evaluate is not None
        found = self._evaluate(model, self.tokenizer, self.heldout, progress=check)
        return {
            "loss": found.nats_per_token,
            "bits_per_byte": found.bits_per_byte,
            "tokens": found.tokens,
            "bytes": found.bytes,
        }


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits of a loss in nats for each byte of its text."""
    return nats / math.log(2) / max(text_bytes, 1.0)
