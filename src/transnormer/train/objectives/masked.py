"""Masked language modelling: hidden tokens from those on both sides."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transnormer.data import Batch, Masking, start_id
from transnormer.data.loader import IGNORED
from transnormer.models.decoder import Decoder
from transnormer.train.metrics import Headline
from transnormer.train.objective_config import MaskedConfig
from transnormer.train.objectives.base import Setting, to_device
from transnormer.train.objectives.windows import WindowObjective

# The held-out masks are the same in every run.
_HELDOUT_SEED = 0


class MaskedReport(NamedTuple):
    """One evaluation on the held-out part after `step` updates, always with the same masks.

    Attributes:
        step: updates done.
        loss: nats per masked token. It is no likelihood of the text: it has no bits per byte.
        accuracy: share of the masked tokens whose likeliest token is the right one.
        masked_tokens: how many there are.
        seconds: the run's own time.
    """

    step: int
    loss: float
    accuracy: float
    masked_tokens: int
    seconds: float

    def headline(self) -> Headline:
        """The loss, and the accuracy beside it."""
        return Headline("nats per masked token", self.loss, f"accuracy {self.accuracy:.3f}")

    def describe(self) -> str:
        """What was found, as words."""
        return (
            f"{self.loss:.4f} nats per masked token  accuracy {self.accuracy:.3f}  "
            f"({self.masked_tokens:,} masked tokens)"
        )


class MaskedObjective(WindowObjective):
    """Cross-entropy of the hidden tokens, in nats; the masks depend on (seed, sample) alone."""

    report = MaskedReport
    masks: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.masking = self._masking(self.config.train.seed)

    def _masking(self, seed: int) -> Masking:
        config = self.config.objective
        assert isinstance(config, MaskedConfig)
        return Masking(
            self.tokenizer,
            self.tokenizer.vocab_size,
            share=config.mask_share,
            mask=config.mask_token,
            random=config.random_token,
            seed=seed,
        )

    @property
    def has_heldout(self) -> bool:
        return bool(self.heldout)

    def batch(self, index: int) -> Batch:
        plain = super().batch(index)
        rows = plain.input_ids.reshape(-1, self.loader.seq).numpy()
        usable = plain.labels.reshape(-1, self.loader.seq).numpy() != IGNORED
        masked = [
            self.masking.apply(ids, number, use)
            for ids, use, number in zip(rows, usable, self.loader.samples(index), strict=True)
        ]
        shape = plain.input_ids.shape
        return Batch(
            torch.from_numpy(np.stack([row.inputs for row in masked])).reshape(shape),
            torch.from_numpy(np.stack([row.labels for row in masked])).reshape(shape),
            plain.cu_seqlens,
        )

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        return model.loss(
            batch.input_ids, batch.labels, reduction="sum", cu_seqlens=batch.cu_seqlens
        )

    def evaluate(self, model: Decoder, check: Callable[[int], None]) -> dict[str, Any]:
        device = next(model.parameters()).device
        nats, right, count = 0.0, 0, 0
        for batch in self._heldout_batches():
            batch = to_device(batch, device)
            scores = model.label_scores(batch.input_ids, batch.labels)
            nats += scores.nats.double().sum().item()
            right += int(scores.right.sum())
            count += len(scores.right)
            check(batch.input_ids.numel())
        return {"loss": nats / count, "accuracy": right / count, "masked_tokens": count}

    def _heldout_batches(self) -> Iterator[Batch]:
        """Every held-out text in windows of data.seq tokens, several of one length at a time."""
        masking, seq = self._masking(_HELDOUT_SEED), self.config.data.seq
        rows: list[Any] = []
        number = 0
        for text in self.tokenizer.encode_batch(self.heldout):
            ids = np.array([start_id(self.tokenizer), *text], dtype=np.int64)
            for start in range(0, len(ids), seq):
                row = masking.apply(ids[start : start + seq], number)
                number += 1
                if rows and len(row.inputs) != len(rows[0].inputs):
                    yield _stack(rows)
                    rows = []
                rows.append(row)
                if len(rows) == self.config.micro_batch:
                    yield _stack(rows)
                    rows = []
        if rows:
            yield _stack(rows)


def _stack(rows: list[Any]) -> Batch:
    return Batch(
        torch.from_numpy(np.stack([row.inputs for row in rows])),
        torch.from_numpy(np.stack([row.labels for row in rows])),
        None,
    )
