"""What every objective offers the trainer, which knows nothing else of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from transnormer.data import Tokenizer
from transnormer.models import checkpoint
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.train.evaluation import Evaluate
from transnormer.train.metrics import HeldoutReport
from transnormer.train.recipe import RunConfig

ModelT = TypeVar("ModelT", bound=checkpoint.AnyModel)
BatchT = TypeVar("BatchT", bound=tuple[Tensor | None, ...])


class Setting(NamedTuple):
    """Where an objective works.

    Attributes:
        config: of the run.
        folder: what the run reads; made there where it is not there yet.
        tell: takes lines about the data.
        evaluate: scores held-out texts with a causal model; None never does.
        rank, world_size: which rows of every global batch this process takes.
    """

    config: RunConfig
    folder: Path
    tell: Callable[[str], None]
    evaluate: Evaluate | None
    rank: int
    world_size: int


class Counts(NamedTuple):
    """What is in a batch, to be summed over batches and processes.

    Attributes:
        labels: predictions asked for; the summed loss is divided by them.
        tokens: read, without pads.
        text_bytes: UTF-8 bytes that the labels stand for; 0 where they are not all of the text.
    """

    labels: int
    tokens: int
    text_bytes: int


class Objective(ABC, Generic[ModelT, BatchT]):
    """One way to train: what is read, which model, its loss, and how it is scored.

    Batches are pure functions of their number, so that a run resumes from one integer.

    Attributes:
        tokenizer: kept beside the weights.
        report: what one evaluation on the held-out part found.
        scores_text: whether the loss is the likelihood of all text, so that it has bits per byte.
    """

    tokenizer: Tokenizer
    report: ClassVar[Callable[..., HeldoutReport]]
    scores_text: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, setting: Setting) -> None:
        """Open the data; raises what open_training_data and the loaders raise."""

    @property
    @abstractmethod
    def has_heldout(self) -> bool:
        """Whether there is something to evaluate on, and a way to."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What config.json records about the data."""

    @abstractmethod
    def build_model(self) -> ModelT:
        """A new model, on the CPU."""

    @abstractmethod
    def batch(self, index: int) -> BatchT:
        """This process's rows of micro-batch `index`, from 0 at the start of the run."""

    @abstractmethod
    def counts(self, batch: BatchT) -> Counts:
        """What is in a batch."""

    @abstractmethod
    def loss(self, model: ModelT, batch: BatchT) -> Tensor:
        """The summed loss of a batch in nats; the batch is on the model's device."""

    @abstractmethod
    def evaluate(self, model: ModelT, check: Callable[[int], None]) -> dict[str, Any]:
        """Score the held-out part with a model in eval mode, without gradients.

        Args:
            model: what to score.
            check: called with the number of tokens just scored, every so often; may raise.

        Returns:
            the fields of `report` but step and seconds.
        """


def to_device(batch: BatchT, device: torch.device) -> BatchT:
    """The same batch on a device."""
    moved = (None if part is None else part.to(device, non_blocking=True) for part in batch)
    return type(batch)(*moved)


def check_model(setting: Setting) -> None:
    """Raise ValueError where the objective cannot train the model of model.init_from.

    Nothing was known of it before. Once the run has its data this was done, and the source may be
    gone.
    """
    if not setting.folder.is_dir():
        setting.config.check_model()


def decoder_config(config: RunConfig, tokenizer: Tokenizer, *, mask: bool = False) -> DecoderConfig:
    """The decoder of a run, with the tokenizer's special ids; with mask it has a mask token."""
    return config.model.build(
        tokenizer.vocab_size,
        pad=tokenizer.pad_id,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        mask=mask,
    )


def load_initial(decoder: Decoder, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Copy the ``initial_weights``; a decoder on the meta device takes them when it has memory."""
    if decoder.embedding.weight.is_meta:
        return
    if (stored := initial_weights(decoder, config, tokenizer)) is not None:
        decoder.load_state_dict(stored)


def initial_weights(
    decoder: Decoder, config: RunConfig, tokenizer: Tokenizer
) -> dict[str, Tensor] | None:
    """The weights of model.init_from, where it is given; they must fit the decoder one by one.

    Those of safetensors files are read when they are used, and take no memory of the host.

    An untied head over the vocabulary stays behind where the decoder has a tied one.

    Raises:
        ValueError: the checkpoint's tokenizer is another, or a tensor is missing, unknown or of
            another shape.
    """
    source = config.model.init_from
    if source is None:
        return None
    trained_with = checkpoint.tokenizer_fingerprint(checkpoint.find_model(source))
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise ValueError(
            f"data.tokenizer has the fingerprint {tokenizer.fingerprint[:12]}; expected "
            f"{trained_with[:12]}, the one that {source} was trained with; leave it out"
        )
    stored = checkpoint.load(source).state_dict()
    if decoder.config.tie_embeddings:
        stored.pop("lm_head.weight", None)
    expected = decoder.state_dict()
    for name in sorted(expected.keys() | stored.keys()):
        have = list(stored[name].shape) if name in stored else None
        want = list(expected[name].shape) if name in expected else None
        if have != want:
            raise ValueError(
                f"model.init_from is {source}, where {name} has shape {have}; expected {want}, as "
                "the run's model has; take another checkpoint"
            )
    return stored
