"""Classification: the class of a whole text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.data import LabelledBatch, LabelledLoader, LabelledSource
from transnormer.models.classifier import ClassifierConfig, SequenceClassifier
from transnormer.train.labelled_data import open_labelled_data
from transnormer.train.metrics import Headline
from transnormer.train.objective_config import ClassificationConfig
from transnormer.train.objectives.base import (
    Counts,
    Objective,
    Setting,
    check_model,
    decoder_config,
    load_initial,
    to_device,
)


class ClassificationReport(NamedTuple):
    """One evaluation on the held-out part after `step` updates.

    Attributes:
        step: updates done.
        loss: nats per text.
        accuracy: share of the texts whose class is found.
        majority_accuracy: what the most frequent class of the training part gets everywhere.
        macro_f1: the mean of the classes' F1 = 2 TP / (2 TP + FP + FN), over those that occur
            among the held-out texts or the answers.
        texts: how many there are.
        seconds: the run's own time.
    """

    step: int
    loss: float
    accuracy: float
    majority_accuracy: float
    macro_f1: float
    texts: int
    seconds: float

    def headline(self) -> Headline:
        """The accuracy, and what it must be compared with."""
        beside = f"majority class {self.majority_accuracy:.3f}, macro-F1 {self.macro_f1:.3f}"
        return Headline("accuracy", self.accuracy, beside)

    def describe(self) -> str:
        """What was found, as words."""
        return (
            f"loss {self.loss:.4f}  accuracy {self.accuracy:.3f} "
            f"(majority class {self.majority_accuracy:.3f})  macro-F1 {self.macro_f1:.3f}  "
            f"({self.texts:,} texts)"
        )


class ClassificationObjective(Objective[SequenceClassifier, LabelledBatch]):
    """Cross-entropy of the classes, in nats a text; padded batches."""

    report = ClassificationReport

    def __init__(self, setting: Setting) -> None:
        config = self.config = setting.config
        assert isinstance(config.objective, ClassificationConfig)
        self.objective = config.objective
        check_model(setting)
        data = open_labelled_data(config, setting.folder, setting.tell)
        self.tokenizer, self.classes = data.tokenizer, data.classes
        self.train, self.heldout = data.train, data.heldout
        self.loader = self._loader(data.train, config.batch_over(setting.world_size)).for_rank(
            setting.rank, setting.world_size
        )

    def _loader(self, source: LabelledSource, batch: int) -> LabelledLoader:
        return LabelledLoader(
            source,
            seq=self.config.data.seq,
            batch=batch,
            seed=self.config.train.seed,
            cut=self.objective.cut,
        )

    @property
    def has_heldout(self) -> bool:
        return self.heldout is not None

    def facts(self) -> dict[str, Any]:
        return {
            "classes": list(self.classes),
            "training_texts": len(self.train),
            "heldout_texts": 0 if self.heldout is None else len(self.heldout),
            "training_tokens": [len(self.train.tokens)],
        }

    def build_model(self) -> SequenceClassifier:
        backbone = decoder_config(self.config, self.tokenizer)
        model = SequenceClassifier(
            ClassifierConfig(
                # A head over the vocabulary would never be trained.
                backbone=backbone.model_copy(update={"tie_embeddings": True}),
                num_classes=len(self.classes),
                pooling=self.objective.pooling,
                dropout=self.objective.dropout,
                labels=self.classes,
            )
        )
        load_initial(model.backbone, self.config, self.tokenizer)
        return model

    def batch(self, index: int) -> LabelledBatch:
        return self.loader.batch(index)

    def counts(self, batch: LabelledBatch) -> Counts:
        return Counts(len(batch.labels), int(batch.mask.sum()), 0)

    def loss(self, model: SequenceClassifier, batch: LabelledBatch) -> Tensor:
        return model.loss(batch.input_ids, batch.labels, reduction="sum", mask=batch.mask)

    def evaluate(self, model: SequenceClassifier, check: Callable[[int], None]) -> dict[str, Any]:
        assert self.heldout is not None
        device = next(model.parameters()).device
        nats = 0.0
        answers: list[int] = []
        labels: list[int] = []
        for batch in self._loader(self.heldout, self.config.micro_batch).in_order_of_length():
            tokens = int(batch.mask.sum())
            batch = to_device(batch, device)
            logits = model(batch.input_ids, batch.mask).float()
            nats += F.cross_entropy(logits, batch.labels, reduction="sum").item()
            answers += logits.argmax(1).tolist()
            labels += batch.labels.tolist()
            check(tokens)
        majority = [self.train.most_frequent()] * len(labels)
        return {
            "loss": nats / len(labels),
            "accuracy": accuracy(answers, labels),
            "majority_accuracy": accuracy(majority, labels),
            "macro_f1": macro_f1(answers, labels),
            "texts": len(labels),
        }


def accuracy(answers: Sequence[int], labels: Sequence[int]) -> float:
    """Share of the answers that are right."""
    return sum(a == b for a, b in zip(answers, labels, strict=True)) / len(labels)


def macro_f1(answers: Sequence[int], labels: Sequence[int]) -> float:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes among the answers or the labels."""
    found = torch.tensor(list(answers)), torch.tensor(list(labels))
    scores = []
    for value in sorted(set(answers) | set(labels)):
        answered, true = (x == value for x in found)
        both = int((answered & true).sum())
        scores.append(2 * both / int(answered.sum() + true.sum()))
    return sum(scores) / len(scores)
