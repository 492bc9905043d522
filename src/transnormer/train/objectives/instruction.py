"""Fine-tuning on instructions: the answers of conversations, several of which share a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.data.loader import IGNORED
from transnormer.data.packed import ConversationSource, PackedBatch, PackedLoader
from transnormer.data.tokenizers import start_id
from transnormer.models.decoder import Decoder
from transnormer.train.instruction_data import open_instruction_data
from transnormer.train.metrics import Headline
from transnormer.train.objectives.base import (
    Counts,
    Objective,
    Setting,
    check_model,
    decoder_config,
    load_initial,
    to_device,
)


class InstructionReport(NamedTuple):
    """One evaluation on the held-out conversations after `step` updates.

    Attributes:
        step: updates done.
        loss: nats per token of an answer, the end-of-text token that ends it included.
        accuracy: share of these tokens that the model thinks likeliest after the true ones before.
        exact: share of the answers of which that holds for every token: those that greedy
            generation gives letter by letter.
        ends: share of the answers' ends where the end-of-text token is likeliest.
        answers: how many there are.
        tokens: of all answers.
        seconds: the run's own time.
    """

    step: int
    loss: float
    accuracy: float
    exact: float
    ends: float
    answers: int
    tokens: int
    seconds: float

    def headline(self) -> Headline:
        """The loss, and what else is told of the answers."""
        beside = (
            f"{self.accuracy:.1%} of tokens, {self.ends:.1%} of ends, {self.exact:.1%} of answers"
        )
        return Headline("answer loss", self.loss, f"right then: {beside}")

    def describe(self) -> str:
        """What was found, as words."""
        return (
            f"answer loss {self.loss:.4f}  right: {self.accuracy:.1%} of tokens, {self.ends:.1%} of "
            f"ends, {self.exact:.1%} of answers  ({self.answers:,} answers)"
        )


class InstructionObjective(Objective[Decoder, PackedBatch]):
    """Cross-entropy of the answers' tokens, in nats; each conversation has a state of its own."""

    report = InstructionReport

    def __init__(self, setting: Setting) -> None:
        config = self.config = setting.config
        check_model(setting)
        data = open_instruction_data(config, setting.folder, setting.tell)
        self.tokenizer, self.train, self.heldout = data.tokenizer, data.train, data.heldout
        batch = config.batch_over(setting.world_size)
        self.loader = self._loader(data.train, batch).for_rank(setting.rank, setting.world_size)

    def _loader(self, source: ConversationSource, batch: int) -> PackedLoader:
        return PackedLoader(
            source,
            seq=self.config.data.seq,
            batch=batch,
            seed=self.config.train.seed,
            pad=start_id(self.tokenizer),
        )

    @property
    def has_heldout(self) -> bool:
        return self.heldout is not None

    def facts(self) -> dict[str, Any]:
        return {
            "training_conversations": len(self.train),
            "heldout_conversations": 0 if self.heldout is None else len(self.heldout),
            "training_tokens": [self.train.num_tokens],
        }

    def build_model(self) -> Decoder:
        decoder = Decoder(decoder_config(self.config, self.tokenizer))
        load_initial(decoder, self.config, self.tokenizer)
        return decoder

    def batch(self, index: int) -> PackedBatch:
        return self.loader.batch(index)

    def counts(self, batch: PackedBatch) -> Counts:
        return Counts(int((batch.labels != IGNORED).sum()), int(batch.tokens), 0)

    def loss(self, model: Decoder, batch: PackedBatch) -> Tensor:
        return model.loss(
            batch.input_ids, batch.labels, reduction="sum", cu_seqlens=batch.cu_seqlens
        )

    def evaluate(self, model: Decoder, check: Callable[[int], None]) -> dict[str, Any]:
        assert self.heldout is not None
        device = next(model.parameters()).device
        sums = dict.fromkeys(("nats", "right", "exact", "ended", "ends", "answers", "tokens"), 0.0)
        for batch in self._loader(self.heldout, self.config.micro_batch).once():
            tokens = int(batch.tokens)
            for name, value in self._score(model, to_device(batch, device)).items():
                sums[name] += value
            check(tokens)
        return {
            "loss": sums["nats"] / sums["tokens"],
            "accuracy": sums["right"] / sums["tokens"],
            "exact": sums["exact"] / sums["answers"],
            "ends": sums["ended"] / max(sums["ends"], 1),
            "answers": int(sums["answers"]),
            "tokens": int(sums["tokens"]),
        }

    def _score(self, model: Decoder, batch: PackedBatch) -> dict[str, float]:
        """Sums over the answers of a batch."""
        scores = model.label_scores(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens)
        at = (batch.labels[0] != IGNORED).nonzero()[:, 0]
        labels, found = batch.labels[0, at], scores.right
        which = answer_numbers(at, batch.cu_seqlens)
        wrong = torch.zeros(int(which[-1]) + 1, device=at.device).index_add_(
            0, which, (~found).float()
        )
        assert self.tokenizer.eos_id is not None
        ends = labels == self.tokenizer.eos_id
        return {
            "nats": scores.nats.double().sum().item(),
            "right": int(found.sum()),
            "exact": int((wrong == 0).sum()),
            "ended": int((found & ends).sum()),
            "ends": int(ends.sum()),
            "answers": len(wrong),
            "tokens": len(at),
        }


def answer_numbers(places: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which answer each of some positions belongs to, from 0, int64 [positions].

    Args:
        places: positions of answers' tokens in a row, ascending, int64 [positions]; an answer is a
            run of neighbours.
        cu_seqlens: where conversations begin, int32 [num_sequences + 1]; no answer crosses there.
    """
    sequence = torch.searchsorted(cu_seqlens.to(torch.int64), places, right=True)
    new = (places.diff() != 1) | (sequence.diff() != 0)
    return F.pad(new.long().cumsum(0), (1, 0))
