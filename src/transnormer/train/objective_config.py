"""The `[objective]` table of a run: what the model learns from."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from transnormer.config import Config
from transnormer.models.classifier import Pooling


class CausalConfig(Config):
    """Predict every token from those before it."""

    # Whether the model must be causal; None takes either kind.
    causal: ClassVar[bool | None] = True
    kind: Literal["causal"] = "causal"


class MaskedConfig(Config):
    """Predict hidden tokens from those on both sides (Devlin et al. 2019, arXiv:1810.04805, 3.1).

    The mask token is one more row of the embedding, behind the tokenizer's ids: the model's
    configuration names it as mask_token_id, the tokenizer stays as it is.

    Attributes:
        mask_share: of a sample's tokens, those that are to be predicted.
        mask_token: of these, the share that becomes the mask token.
        random_token: the share that becomes a token drawn at random; the rest stays what it is.
    """

    causal: ClassVar[bool | None] = False
    kind: Literal["masked"] = "masked"
    mask_share: float = Field(default=0.15, gt=0, le=1)
    mask_token: float = Field(default=0.8, ge=0, le=1)
    random_token: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "MaskedConfig":
        if self.mask_token + self.random_token > 1:
            raise ValueError(
                f"random_token is {self.random_token} beside mask_token {self.mask_token}; "
                "expected at most 1 together"
            )
        return self


class ClassificationConfig(Config):
    """Predict the class of a whole text; `data.path` is JSON lines.

    Attributes:
        text_field: the field that holds the text.
        label_field: the field that holds the class: a string, an integer or a boolean. The
            classes are those of the training part, sorted.
        choices_field: a field with the list of all classes, the same in every line; label_field is
            then an index into it.
        split_seed: of the held-out share; the seed of the run does not change it.
        cut: which end of a text longer than data.seq is left out.
        pooling: "mean", "last" or "first" token, see models/classifier.py.
        dropout: of the pooled vector.
    """

    causal: ClassVar[bool | None] = None
    kind: Literal["classification"] = "classification"
    text_field: str = Field(default="text", min_length=1)
    label_field: str = Field(default="label", min_length=1)
    choices_field: str | None = Field(default=None, min_length=1)
    split_seed: int = Field(default=0, ge=0)
    cut: Literal["start", "end"] = "end"
    pooling: Pooling = "mean"
    dropout: float = Field(default=0.1, ge=0, lt=1)


class InstructionConfig(Config):
    """Predict the answers of conversations; `data.path` is JSON lines (data/conversations.py).

    Attributes:
        template: how a conversation is written: one of `data.chat_template.TEMPLATES`, or the path
            of a jinja2 file. None is the one beside model.init_from, else "released". It is kept
            beside the tokenizer of every checkpoint.
        too_long: what becomes of a conversation of more than data.seq tokens: it is "cut" at its
            end, or "drop"ped, or an "error" that names its line.
        split_seed: of the held-out share; the seed of the run does not change it. Lines with the
            same `group` are on one side.
    """

    causal: ClassVar[bool | None] = True
    kind: Literal["instruction"] = "instruction"
    template: str | None = Field(default=None, min_length=1)
    too_long: Literal["cut", "drop", "error"] = "cut"
    split_seed: int = Field(default=0, ge=0)


ObjectiveConfig = Annotated[
    CausalConfig | MaskedConfig | ClassificationConfig | InstructionConfig,
    Field(discriminator="kind"),
]
