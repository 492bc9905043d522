"""Generation from a state: prefill once, then one token a step.

The engine knows token ids and states, nothing of text or of the family of the model.
"""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from transnormer.config import validate
from transnormer.infer.prompts import (
    Stop,
    checked_count,
    checked_prompts,
    checked_stops,
    ends_with_stop,
    is_integer,
)
from transnormer.infer.reading import advance, read
from transnormer.infer.sampling import Draws, SamplingConfig, sample
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState

FINISHED = -1
# A prompt is read in pieces of this many tokens, so that memory is flat in its length.
PREFILL_TOKENS = 8192


def generate(
    model: Decoder,
    input_ids: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    state: DecoderState | None = None,
) -> "Generation":
    """Continue prompts token by token.

    The prompts are read at once, the tokens are drawn as the result is iterated.

    Args:
        model: a causal decoder; it runs in eval mode and is left in the mode it was in.
        input_ids: prompts, int64 [batch, seq], or a list of 1-D tensors of any lengths, which are
            read in one packed call.
        max_new_tokens: largest number of tokens for each row.
        temperature: divides the logits; 0 is greedy.
        top_k: keep this many of the likeliest tokens.
        top_p: keep the likeliest tokens whose probabilities reach this sum.
        seed: row i's draws depend on (seed, i) only; None takes one from torch's generator.
        stop: token ids, or sequences of ids, that end a row; they are still yielded. None means
            the config's end-of-sequence id, an empty list nothing.
        state: what came before the prompts, a row for each; it is not modified.

    Returns:
        An iterator over int64 [batch] with ``state``, ``finish_reasons`` and ``token_ids``.

    Raises:
        ValueError: an id beyond the vocabulary, an empty prompt, a sampling value out of range, a
            state of another batch, a model that is not causal.
        TypeError: prompts that are no integer tensors.
    """
    if not model.config.causal:
        raise ValueError("config.causal is False; expected True: only a causal model generates")
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}; expected a number")
        values[name] = int(value) if is_integer(value) else float(value)
    sampling = validate(SamplingConfig, values, source="arguments of generate")
    max_new_tokens = checked_count("max_new_tokens", max_new_tokens)
    seed = int(torch.randint(2**62, ())) if seed is None else checked_count("seed", seed)
    prompts = checked_prompts(input_ids, model.config.vocab_size)
    return Generation(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        draws=Draws(seed, len(prompts)),
        stops=checked_stops(stop, model.config),
        state=state,
    )


class Generation:
    """The tokens of a batch as they are drawn; made by ``generate``.

    Iterating yields int64 [batch] on the model's device, -1 for rows that have finished, and ends
    when all have.

    Attributes:
        token_ids: for each row the ids drawn so far, the ones that stopped it included.
        finish_reasons: for each row "stop", "length", or None while it runs.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: list[Tensor],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        draws: Draws,
        stops: list[tuple[int, ...]],
        state: DecoderState | None,
    ) -> None:
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.finish_reasons: list[str | None] = [None if max_new_tokens else "length"] * len(
            prompts
        )
        self._model, self._sampling, self._draws, self._stops = model, sampling, draws, stops
        self._max_new_tokens = max_new_tokens
        self._device = next(model.parameters()).device
        # Tokens drawn and not yet read by the model, -1 for none.
        self._unread: Tensor | None = None
        # Ids from here on are never drawn.
        self._limit: int | None = None
        self._logits, self._state = self._prefill(prompts, state)

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> Tensor:
        if all(self.finish_reasons):
            raise StopIteration
        self._read()
        active = [reason is None for reason in self.finish_reasons]
        uniforms = self._draws.next(active) if self._sampling.temperature > 0.0 else None
        drawn = sample(self._logits[:, : self._limit], self._sampling, uniforms)
        if not all(active):
            drawn[torch.tensor([not alive for alive in active], device=drawn.device)] = FINISHED
        for row, token in enumerate(drawn.tolist()):
            if active[row]:
                self._record(row, token)
        self._unread = drawn
        return drawn.clone()

    def draw_below(self, limit: int) -> None:
        """Draw only ids below a limit from now on, as if the model had no others.

        A vocabulary may be padded beyond the ids that its tokenizer has a text for.
        """
        if limit < 1:
            raise ValueError(f"limit is {limit}; expected at least 1")
        self._limit = limit

    @property
    def state(self) -> DecoderState:
        """The state after every prompt and all of its ``token_ids``; generation may go on from it.

        The last tokens are read by the model when this is asked for.
        """
        self._read()
        return self._state

    def _record(self, row: int, token: int) -> None:
        ids = self.token_ids[row]
        ids.append(token)
        if ends_with_stop(ids, self._stops):
            self.finish_reasons[row] = "stop"
        elif len(ids) == self._max_new_tokens:
            self.finish_reasons[row] = "length"

    def _read(self) -> None:
        """Advance the state over the tokens drawn last; finished rows leave no trace in it."""
        if self._unread is None:
            return
        tokens = self._unread[:, None]
        real = tokens != FINISHED
        mask = None if bool(real.all()) else real
        ids = tokens.clamp(min=0)
        self._logits, self._state = advance(self._model, ids, self._state, mask=mask)
        # Only now: an interrupt during the pass loses no token.
        self._unread = None

    def _prefill(
        self, prompts: list[Tensor], state: DecoderState | None
    ) -> tuple[Tensor, DecoderState]:
        lengths = [len(prompt) for prompt in prompts]
        if len(set(lengths)) > 1:
            packed = torch.cat(prompts)[None].to(self._device)
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(self._device)
            return advance(self._model, packed, state, cu_seqlens=bounds)
        ids = torch.stack(prompts).to(self._device)
        pieces = ids.split(max(1, PREFILL_TOKENS // len(prompts)), dim=1)
        return read(self._model, pieces, state)
