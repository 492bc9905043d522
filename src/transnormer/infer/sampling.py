"""From logits to token ids: temperature, top-k, top-p and one uniform number for each row."""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from transnormer.config import Config


class SamplingConfig(Config):
    """How the next token is drawn from the logits.

    The order is temperature, then top_k, then top_p over what top_k left.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens; None keeps all."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens whose probabilities reach this sum; None keeps all."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; expected a finite number of at least 0; "
                "0 takes the likeliest token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k is {self.top_k}; expected at least 1; leave it out to keep all tokens"
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"top_p is {self.top_p}; expected 0 < top_p <= 1; leave it out to keep all tokens"
            )
        return self


class Draws:
    """Uniform numbers in [0, 1) for each row of a batch, a pure function of (seed, row, count).

    A counter-based generator keyed by the pair gives row i the same numbers in any batch and
    beside any other rows.

    Args:
        seed: 0 <= seed < 2^64.
        rows: size of the batch.

    Raises:
        ValueError: a seed out of range.
    """

    def __init__(self, seed: int, rows: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; expected 0 <= seed < 2^64")
        self._rows = [
            np.random.Generator(np.random.Philox(key=np.array([seed, row], dtype=np.uint64)))
            for row in range(rows)
        ]

    def next(self, active: Sequence[bool]) -> Tensor:
        """One number for each active row, 0 for the others: float64 [batch] on the CPU."""
        numbers = [
            row.random() if alive else 0.0 for row, alive in zip(self._rows, active, strict=True)
        ]
        return torch.tensor(numbers, dtype=torch.float64)


def sample(logits: Tensor, config: SamplingConfig, uniforms: Tensor | None) -> Tensor:
    """Draw one token of each row by inverting the cumulative distribution at its uniform number.

    Probabilities and their sums are float64.

    Args:
        logits: [batch, vocab_size]; -inf forbids a token.
        config: temperature, top_k, top_p.
        uniforms: [batch] in [0, 1); unused, and may be None, where the temperature is 0.

    Returns:
        token ids, int64 [batch].

    Raises:
        ValueError: a row without a finite largest logit (NaN or infinity).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(-1, keepdim=True)
    bad = ~torch.isfinite(largest[:, 0])
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"the largest logit of row {row} is {largest[row].item()}; expected a finite number; "
            "the weights may be damaged or the training may have diverged"
        )
    if config.temperature == 0.0:
        return logits.argmax(-1)
    if uniforms is None:
        raise ValueError("uniforms is None; expected [batch] numbers where temperature > 0")
    # The largest is taken off first, so that no temperature, however small, overflows; in float64,
    # where no temperature that is not zero becomes zero.
    scaled = (logits - largest).double() / config.temperature
    ids: Tensor | None = None
    if config.top_k is not None or config.top_p is not None:
        count = logits.shape[-1] if config.top_k is None else min(config.top_k, logits.shape[-1])
        scaled, ids = scaled.topk(count, dim=-1)
    weights = scaled.softmax(-1)
    if config.top_p is not None:
        before = weights.cumsum(-1) - weights
        # The likeliest token stays whatever rounding does to the first difference.
        before[:, 0] = 0.0
        weights = weights.masked_fill(before >= config.top_p, 0.0)
    cumulative = weights.cumsum(-1)
    target = uniforms.to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put the target on the total: the last token that has any weight is meant.
    last = (weights > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)
    index = torch.minimum(index, last)
    return (index if ids is None else ids.gather(-1, index))[:, 0]
