"""The `[lora]` table of a run: train small additions to frozen weights."""

from pydantic import Field

from transnormer.config import Config


class LoraConfig(Config):
    """Low-rank adaptation: W x becomes W x + (alpha / rank) B A x, and only A and B are trained.

    (Hu et al. 2021, arXiv:2106.09685.) B begins at 0, so that the first step has the model of
    model.init_from. The checkpoints hold the merged model, and A and B in adapter/, in peft's files.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the scale is alpha / rank; None is 2 rank.
        dropout: of the input of A, in training.
        targets: last names of the projections that get one; None is every one in the blocks.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
