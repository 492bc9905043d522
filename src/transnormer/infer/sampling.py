"""From logits to token ids: penalties, temperature, filters and one uniform number for each row.

Every row is drawn by its own configuration, and by arithmetic that does not depend on the others:
a request gets the same tokens in any batch.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from transnormer.config import Config

# Rows of logits whose probabilities are computed at once.
_LOGPROB_ROWS = 128


class SamplingConfig(Config):
    """How the next token is drawn from the logits.

    The order is the penalties, logit_bias, temperature, top_k, top_p over what top_k left, min_p.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens; None keeps all."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens whose probabilities reach this sum; None keeps all."""
    min_p: float | None = None
    """Keep the tokens at least this share as likely as the likeliest; None keeps all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens that the prompt or
    the output holds (Keskar et al. 2019, arXiv:1909.05858, section 4.1)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the output holds."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens as often as the output holds them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token and what is added to its logit; -inf forbids the token."""

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
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(
                    f"{name} is {value}; expected 0 < {name} <= 1; leave it out to keep all tokens"
                )
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; expected a finite number above "
                "0; 1 has no effect"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number")
        for token, bias in self.logit_bias:
            if token < 0:
                raise ValueError(f"logit_bias names the token {token}; expected at least 0")
            if not bias < math.inf:
                raise ValueError(
                    f"logit_bias of token {token} is {bias}; expected a finite number, or -inf to "
                    "forbid the token"
                )
        return self

    @property
    def adjusts(self) -> bool:
        """Whether logits change before they are sampled from: penalties or a bias."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
        )


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

    def one(self, row: int) -> float:
        """The next number of one row."""
        return float(self._rows[row].random())

    def next(self, active: Sequence[bool]) -> Tensor:
        """One number for each active row, 0 for the others: float64 [batch] on the CPU."""
        numbers = [
            row.random() if alive else 0.0 for row, alive in zip(self._rows, active, strict=True)
        ]
        return torch.tensor(numbers, dtype=torch.float64)


class TokenHistory:
    """The tokens of one row that penalties look at.

    Args:
        prompt: ids that the row began with.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._prompt = frozenset(prompt)
        self._output: Counter[int] = Counter()

    def add(self, token: int) -> None:
        """Count a token of the output."""
        self._output[token] += 1

    def adjust(self, logits: Tensor, config: SamplingConfig) -> Tensor:
        """The logits [vocab_size] of the next token after penalties and bias; a new tensor."""
        logits, device = logits.clone(), logits.device
        seen = sorted(self._prompt | self._output.keys())
        if config.repetition_penalty != 1.0 and seen:
            index = placed(seen, torch.int64, device)
            old = logits[index]
            penalty = config.repetition_penalty
            logits[index] = torch.where(old > 0, old / penalty, old * penalty)
        if self._output and (config.presence_penalty or config.frequency_penalty):
            counts = sorted(self._output.items())
            index = placed([token for token, _ in counts], torch.int64, device)
            times = placed([count for _, count in counts], torch.int64, device)
            taken = config.presence_penalty + config.frequency_penalty * times
            logits[index] -= taken.to(logits.dtype)
        if config.logit_bias:
            index = placed([token for token, _ in config.logit_bias], torch.int64, device)
            bias = placed([bias for _, bias in config.logit_bias], torch.float32, device)
            logits.index_add_(0, index, bias.to(logits.dtype))
        return logits


class TokenLogprobs(NamedTuple):
    """What the model thought of a token: natural logarithms of its own probabilities.

    Attributes:
        logprob: of the token, before penalties, bias, temperature and filters.
        top: the likeliest tokens and theirs, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], count: int, limit: int | None = None
) -> list[TokenLogprobs]:
    """The log probability of a token and of the ``count`` likeliest, for each row of logits.

    Computed in float32 (float64 for float64 logits), some rows at a time.

    Args:
        logits: [rows, vocab_size].
        tokens: one a row.
        count: likeliest tokens to name.
        limit: ids from here on have the probability 0; None has no limit.
    """
    found: list[TokenLogprobs] = []
    count = min(count, logits.shape[-1] if limit is None else limit)
    for start in range(0, len(tokens), _LOGPROB_ROWS):
        part = raised(logits[start : start + _LOGPROB_ROWS])
        if limit is not None and limit < part.shape[-1]:
            part = torch.cat([part[:, :limit], torch.full_like(part[:, limit:], -math.inf)], -1)
        logprobs = part.log_softmax(-1)
        ids = torch.tensor(tokens[start : start + _LOGPROB_ROWS], device=logits.device)
        own = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
        best, places = logprobs.topk(count, dim=-1)
        for logprob, values, names in zip(own, best.tolist(), places.tolist(), strict=True):
            found.append(TokenLogprobs(logprob, tuple(zip(names, values, strict=True))))
    return found


def raised(logits: Tensor) -> Tensor:
    """Logits in the dtype that sampling compares them in: float32, float64 for float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def placed(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on a device, which is not waited for."""
    made = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and not made.is_cuda:
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)


def unusable_rows(logits: Tensor) -> Tensor:
    """bool [batch]: rows [batch, vocab_size] whose largest logit is NaN or infinite."""
    return ~torch.isfinite(logits.amax(-1))


def sample(
    logits: Tensor, config: SamplingConfig | Sequence[SamplingConfig], uniforms: Tensor | None
) -> Tensor:
    """Draw one token of each row by inverting the cumulative distribution at its uniform number.

    Probabilities and their sums are float64. Penalties and bias are not applied here but by
    ``TokenHistory.adjust``.

    Args:
        logits: [batch, vocab_size]; -inf forbids a token.
        config: temperature, top_k, top_p, min_p, for all rows or for each.
        uniforms: [batch] in [0, 1); unused, and may be None, where every temperature is 0.

    Returns:
        token ids, int64 [batch].

    Raises:
        ValueError: a row without a finite largest logit (NaN or infinity).
    """
    logits = raised(logits)
    bad = unusable_rows(logits)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"the largest logit of row {row} is {logits[row].amax().item()}; expected a finite "
            "number; the weights may be damaged or the training may have diverged"
        )
    configs = [config] * len(logits) if isinstance(config, SamplingConfig) else config
    return draw(logits, configs, uniforms)


def draw(logits: Tensor, configs: Sequence[SamplingConfig], uniforms: Tensor | None) -> Tensor:
    """``sample`` of logits that are ``raised``, without waiting for a device.

    A row without a finite largest logit gets some token: ask ``unusable_rows``.
    """
    batch, vocab_size = logits.shape
    tokens = logits.argmax(-1)
    groups: dict[int | None, list[int]] = {}
    for row, own in enumerate(configs):
        if own.temperature > 0.0:
            groups.setdefault(_candidates(own, vocab_size), []).append(row)
    if groups and uniforms is None:
        raise ValueError("uniforms is None; expected [batch] numbers where temperature > 0")
    for count, rows in groups.items():
        assert uniforms is not None
        whole = len(rows) == batch
        index = placed(rows, torch.int64, logits.device)
        part = logits if whole else logits[index]
        # Where the uniforms are, which need not be the device of the logits.
        numbers = placed(uniforms if whole else uniforms[rows], uniforms.dtype, logits.device)
        drawn = _invert(part, [configs[row] for row in rows], numbers, count)
        tokens = drawn if whole else tokens.index_copy(0, index, drawn)
    return tokens


def _candidates(config: SamplingConfig, vocab_size: int) -> int | None:
    """How many of the likeliest tokens a row needs in order; None for the vocabulary as it is.

    A power of two or the vocabulary, so that few groups of rows arise, and of the row's own
    configuration alone, so that its sums do not depend on the rows beside it.
    """
    if config.top_k is None:
        return None if config.top_p is None else vocab_size
    return min(vocab_size, 1 << (config.top_k - 1).bit_length())


def _invert(
    logits: Tensor, configs: Sequence[SamplingConfig], uniforms: Tensor, count: int | None
) -> Tensor:
    """Draw a token of each row with a positive temperature; ``count`` of ``_candidates``."""

    def column(values: list[float]) -> Tensor:
        return placed(values, torch.float64, logits.device)[:, None]

    # The largest is taken off first, so that no temperature, however small, overflows; in float64,
    # where no temperature that is not zero becomes zero.
    scaled = (logits - logits.amax(-1, keepdim=True)).double()
    scaled = scaled / column([config.temperature for config in configs])
    ids: Tensor | None = None
    if count is not None:
        scaled, ids = scaled.topk(count, dim=-1)
        kept = column([float(config.top_k or count) for config in configs])
        scaled = scaled.masked_fill(torch.arange(count, device=logits.device) >= kept, -math.inf)
    weights = scaled.softmax(-1)
    if any(config.top_p is not None for config in configs):
        before = weights.cumsum(-1) - weights
        # The likeliest token stays whatever rounding does to the first difference.
        before[:, 0] = 0.0
        limit = column([math.inf if c.top_p is None else c.top_p for c in configs])
        weights = weights.masked_fill(before >= limit, 0.0)
    if any(config.min_p is not None for config in configs):
        share = column([config.min_p or 0.0 for config in configs])
        weights = weights.masked_fill(weights < share * weights.amax(-1, keepdim=True), 0.0)
    cumulative = weights.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put the target on the total: the last token that has any weight is meant.
    last = (weights > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)
    index = torch.minimum(index, last)
    return (index if ids is None else ids.gather(-1, index))[:, 0]
