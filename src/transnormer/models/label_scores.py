"""Which labels of a batch a decoder gets right, and at what loss: what objectives evaluate."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transnormer.ops.checks import accumulation_dtype
from transnormer.ops.cross_entropy import IGNORE_INDEX

if TYPE_CHECKING:
    from transnormer.models.decoder import Decoder

# Logits held at once.
_LOGITS = 2**24


class LabelScores(NamedTuple):
    """What a model says of the labels that count, row by row and in order of their positions.

    Attributes:
        nats: negative log-likelihood of each, float32 (float64 for a float64 model) [labels].
        right: whether it is the likeliest token, bool [labels].
    """

    nats: Tensor
    right: Tensor


def label_scores(
    model: "Decoder", input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None
) -> LabelScores:
    """Score the labels of a batch; logits are made for labels that count alone, a part at a time.

    Args:
        model: in eval mode, without gradients.
        input_ids: [batch, seq].
        labels: int64 [batch, seq]; position t predicts labels[t]; -100 is ignored.
        cu_seqlens: as ``Decoder.forward``'s.

    Raises:
        ValueError: as ``Decoder.forward``.
    """
    x, _ = model.hidden(input_ids, cu_seqlens=cu_seqlens, keep_state=False)
    asked = labels != IGNORE_INDEX
    rows = max(1, _LOGITS // model.config.vocab_size)
    nats, right = [], []
    for part, wanted in zip(x[asked].split(rows), labels[asked].split(rows), strict=True):
        logits = model.logits(part)
        logits = logits.to(accumulation_dtype(logits.dtype))
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(1) == wanted)
    return LabelScores(torch.cat(nats), torch.cat(right))
