"""One request to an engine: what was asked, and what has come of it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

from torch import Tensor

from transnormer.infer.lookup import PromptLookup
from transnormer.infer.prompts import ends_with_stop
from transnormer.infer.sampling import Draws, SamplingConfig, TokenHistory, TokenLogprobs
from transnormer.models.state import DecoderState

FinishReason = Literal["stop", "length", "cancelled", "error"]
# Told the tokens so far, whether they end here: a stop string looks at their text.
Until = Callable[[Sequence[int]], bool]
# Told when a request has ended.
OnFinish = Callable[["Request"], object]


class ReadOnlyIds(Sequence[int]):
    """A list of ids that its holder sees grow and cannot change; slices are copies."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._ids[index]


class Request:
    """A prompt being continued; made by ``Engine.submit``.

    Iterating yields the tokens, and runs the engine while there is none to yield.

    Attributes:
        prompt: its ids, int64 [tokens] on the CPU.
        logprobs: one entry a token where they were asked for.
        prompt_logprobs: one entry a token of the prompt read so far where they were asked for; None
            for the first, which nothing predicts.
        finish_reason: "stop", "length", "cancelled", "error", or None while it waits or runs.
        error: why it ended, where that was an error of its own.
        cached_tokens: tokens of the prompt that the prefix cache knew.
        submitted_at, first_token_by, first_token_at: numbers of engine steps: when it came, when
            its first token comes at the latest, and when it came (None before).
    """

    def __init__(
        self,
        prompt: Tensor,
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        stops: list[tuple[int, ...]],
        until: Until | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        state: DecoderState | None,
        keep_state: bool,
        on_finish: OnFinish | None,
        run: Callable[[], object],
    ) -> None:
        self.prompt = prompt
        self.max_new_tokens, self.sampling, self.keep_state = max_new_tokens, sampling, keep_state
        self._ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self._kept: DecoderState | None = None
        self._start = 0 if state is None else int(state.positions[0])
        self.cached_tokens = 0
        self.submitted_at = self.first_token_by = 0
        self.first_token_at: int | None = None
        self.initial_state = state
        self.logprobs_count, self.prompt_logprobs_count = logprobs, prompt_logprobs
        # Logits after the last token read, which predict the next one of the prompt.
        self.ahead: Tensor | None = None
        self.cancelled = False
        # Tokens of the prompt that the model has read.
        self.read_tokens = 0
        # Asked every step, and a tensor's length is not free.
        self.prompt_tokens = len(prompt)
        self._stops, self._until, self._run = stops, until, run
        self._on_finish = on_finish
        self._draws = Draws(seed, 1) if sampling.temperature > 0.0 else None
        self._history = TokenHistory(prompt.tolist()) if sampling.adjusts else None
        self._lookup: PromptLookup | None = None
        # Whether its tokens are the likeliest of the model's logits as they are; asked every step.
        self.greedy = self._draws is None and self._history is None

    @property
    def token_ids(self) -> list[int]:
        """A copy of the ids drawn so far, those that stopped it included."""
        return self._ids.copy()

    @property
    def drawn(self) -> int:
        """How many tokens were drawn so far."""
        return len(self._ids)

    @property
    def last_token(self) -> int:
        """The id drawn last; there is one."""
        return self._ids[-1]

    @property
    def finished(self) -> bool:
        """Whether there will be no further token."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """End the request before the engine's next step; its slot is free from then on."""
        self.cancelled = True

    def result(self) -> list[int]:
        """Run the engine until the request has finished; returns its ``token_ids``.

        Raises:
            Exception: the request's own error.
        """
        while not self.finished:
            self._run()
        if self.error is not None:
            raise self.error
        return self.token_ids

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            while given < len(self._ids):
                given += 1
                yield self._ids[given - 1]
            if self.finished:
                self.result()
                return
            self._run()

    @property
    def state(self) -> DecoderState:
        """The state after the prompt and all of ``token_ids``, one row.

        Raises:
            RuntimeError: it is not there: ``keep_state`` was not asked for, the request has not
                finished, or it ended with an error or before its prompt was read.
        """
        if self._kept is None:
            raise RuntimeError(
                f"the request has no state (keep_state is {self.keep_state}, finish_reason is "
                f"{self.finish_reason}); expected one that was submitted with keep_state=True, has "
                "finished without an error, and has read its prompt"
            )
        return self._kept

    def keep(self, state: DecoderState) -> None:
        """Record the state after the last token."""
        self._kept = state

    @property
    def position(self) -> int:
        """Position after the last token, the tokens before the prompt counted."""
        return self._start + self.prompt_tokens + len(self._ids)

    @property
    def adjusts(self) -> bool:
        """Whether penalties or a bias change the request's logits."""
        return self._history is not None

    def adjusted(self, logits: Tensor) -> Tensor:
        """The logits [vocab_size] after the request's penalties and bias."""
        return logits if self._history is None else self._history.adjust(logits, self.sampling)

    def uniform(self) -> float:
        """The uniform number of the next draw; 0 for a greedy request."""
        return 0.0 if self._draws is None else self._draws.one(0)

    def take(self, token: int) -> None:
        """Record the next token, and whether it is the last."""
        self._ids.append(token)
        if self._history is not None:
            self._history.add(token)
        if self._lookup is not None:
            self._lookup.add(token)
        if self._stops and ends_with_stop(self._ids, self._stops):
            self.finish_reason = "stop"
        elif self._until is not None and self._ends(self._until):
            self.finish_reason = self.finish_reason or "stop"
        elif len(self._ids) == self.max_new_tokens:
            self.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        """End the request with an error of its own."""
        self.error, self.finish_reason = error, "error"

    def report(self) -> None:
        """Tell the caller that the request has finished and its slot is free."""
        call, self._on_finish = self._on_finish, None
        if call is None:
            return
        try:
            call(self)
        except Exception as error:
            # As for ``until``: nobody else's tokens depend on it.
            self.fail(error)

    def fail_at(self, largest: float | None) -> None:
        """End the request because of its largest logit, which no token can be drawn from.

        Args:
            largest: None where it is known no more.
        """
        found = "NaN or infinite" if largest is None else largest
        self.fail(
            ValueError(
                f"the largest logit of the request is {found}; expected a finite number; its "
                "state, its bias or the weights hold NaN or infinity, or every token is forbidden"
            )
        )

    def look_up_drafts(self) -> None:
        """Draft from now on from the prompt and what follows it."""
        self._lookup = PromptLookup(self.prompt.tolist())

    def draft(self, most: int) -> list[int]:
        """Up to so many tokens that may come next, fewer than may still be asked for."""
        left = self.max_new_tokens - len(self._ids) - 1
        if self._lookup is None or left < 1:
            return []
        return self._lookup.propose(min(most, left))

    def _ends(self, until: Until) -> bool:
        try:
            return bool(until(ReadOnlyIds(self._ids)))
        except Exception as error:
            # The caller's mistake ends the caller's request, and ``result`` raises it.
            self.fail(error)
            return True
