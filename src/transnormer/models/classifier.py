"""Classes of whole sequences: a decoder without its head, a pool over its tokens, a linear map."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from transnormer.config import Config
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.ops.checks import accumulation_dtype, check_tensor, values_are_visible

Pooling = Literal["mean", "last", "first"]


class ClassifierConfig(Config):
    """A sequence classifier.

    Attributes:
        backbone: the decoder, causal or not; tied, since it has no head of its own.
        num_classes: at least 2.
        pooling: "mean" of the real tokens, the "last" one, or the "first" one, which only a
            bidirectional backbone has told anything of the others.
        dropout: of the pooled vector, in training.
        labels: the classes' names, where they have any.
    """

    backbone: DecoderConfig
    num_classes: int = Field(ge=2)
    pooling: Pooling = "mean"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    labels: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ClassifierConfig":
        if not self.backbone.tie_embeddings:
            raise ValueError(
                "backbone.tie_embeddings is False; expected True: a classifier has no head over "
                "the vocabulary"
            )
        if self.pooling == "first" and self.backbone.causal:
            raise ValueError(
                "pooling is 'first' and the backbone is causal, so that its first token has seen "
                "no other; expected 'mean' or 'last', or causal = false"
            )
        if self.labels is not None and len(self.labels) != self.num_classes:
            raise ValueError(
                f"labels has {len(self.labels)} names; expected {self.num_classes}, one a class"
            )
        return self


class SequenceClassifier(nn.Module):
    """logits = head(dropout(pool(hidden(ids)))), one row a sequence.

    The mean is over real tokens and computed in float32 (float64 for a float64 model), so pads
    change nothing. The head is N(0, init_std^2) with a bias of 0.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Decoder(config.backbone)
        self.head = nn.Linear(config.backbone.model_dim, config.num_classes)
        self.reset_head()

    def reset_head(self) -> None:
        """Initialise the head in place."""
        nn.init.normal_(self.head.weight, std=self.config.backbone.init_std)
        nn.init.zeros_(self.head.bias)

    def reset_parameters(self) -> None:
        """Initialise everything in place: after ``to_empty`` this makes a new model."""
        self.backbone.reset_parameters()
        self.reset_head()

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of every sequence, [batch, num_classes], in the model's dtype.

        Args:
            input_ids: int64 or int32 [batch, seq], seq >= 1.
            mask: bool [batch, seq]; False tokens are pads, on any side or between others.

        Raises:
            ValueError: shapes, ids outside the vocabulary, a row of pads alone.
            TypeError: dtypes.
        """
        x, _ = self.backbone.hidden(input_ids, mask=mask, keep_state=False)
        pooled = F.dropout(self._pool(x, mask), self.config.dropout, self.training)
        return self.head(pooled.to(x.dtype))

    def _pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """One vector a row: [batch, seq, model_dim] to [batch, model_dim]."""
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        elif values_are_visible(mask) and not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise ValueError(
                f"mask[{row}] hides every token; expected a real one in each row; leave it out"
            )
        if self.config.pooling == "mean":
            x = x.to(accumulation_dtype(x.dtype))
            total = torch.where(mask[..., None], x, 0.0).sum(1)
            return total / mask.sum(1, keepdim=True).clamp(min=1)
        place = torch.arange(x.shape[1], device=x.device)
        if self.config.pooling == "first":
            chosen = torch.where(mask, place, x.shape[1] - 1).amin(1)
        else:
            chosen = torch.where(mask, place, 0).amax(1)
        return x[torch.arange(x.shape[0], device=x.device), chosen]

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        reduction: str = "mean",
        mask: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of the classes in nats, float32 (float64 for a float64 model).

        Args:
            input_ids, mask: as ``forward``'s.
            labels: int64 [batch], 0 to num_classes - 1.
            reduction: "mean" over the rows, or "sum".

        Raises:
            ValueError: as ``forward``; an unknown reduction, labels of another shape or class.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'")
        check_tensor("labels", labels)
        if labels.shape != input_ids.shape[:1]:
            raise ValueError(
                f"labels has shape {list(labels.shape)}; expected [{input_ids.shape[0]}], one a row"
            )
        if values_are_visible(labels):
            low, high = (int(x) for x in labels.aminmax())
            if low < 0 or high >= self.config.num_classes:
                raise ValueError(
                    f"labels holds {low if low < 0 else high}; expected 0 to "
                    f"{self.config.num_classes - 1}"
                )
        logits = self(input_ids, mask)
        logits = logits.to(accumulation_dtype(logits.dtype))
        return F.cross_entropy(logits, labels, reduction=reduction)

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters with the head's; without the backbone's embeddings if asked."""
        head = sum(p.numel() for p in self.head.parameters())
        return self.backbone.num_parameters(embeddings=embeddings) + head
