"""What an engine counts: for a monitor, and for those who wonder where time goes."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from transnormer.infer.request import FinishReason, Request


class EngineMetrics(NamedTuple):
    """What an engine has done since it was made, and how it stands now.

    Attributes:
        slots: requests that may run at once.
        running: requests that have a slot.
        waiting: requests in the queue.
        state_bytes: of the states held now, those of free slots included.
        steps: finished steps.
        step_seconds: seconds of all of them.
        last_step_seconds: seconds of the last one.
        submitted: requests that were taken.
        refused: requests that found the queue full.
        finished: requests that ended, by their finish_reason.
        prompt_tokens: tokens of prompts that the model read.
        cached_tokens: tokens of prompts that the prefix cache knew.
        cache_hits: requests whose prompt began with tokens that it knew.
        cache_misses: the others that looked.
        generated_tokens: tokens drawn.
        drafted_tokens: drafts that the model looked at.
        accepted_tokens: drafts that were the token drawn.
    """

    slots: int
    running: int
    waiting: int
    state_bytes: int
    steps: int
    step_seconds: float
    last_step_seconds: float
    submitted: int
    refused: int
    finished: Mapping[FinishReason, int]
    prompt_tokens: int
    cached_tokens: int
    cache_hits: int
    cache_misses: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int


class Tally:
    """The counts of an engine as they grow; one number each, so that any thread may read them."""

    def __init__(self) -> None:
        self.steps = 0
        self.step_seconds = self.last_step_seconds = 0.0
        self.submitted = self.refused = 0
        self.prompt_tokens = self.cached_tokens = 0
        self.cache_hits = self.cache_misses = 0
        self.generated_tokens = self.drafted_tokens = self.accepted_tokens = 0
        self._finished: Counter[FinishReason] = Counter()

    def add_step(self, seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.step_seconds += seconds
        self.last_step_seconds = seconds

    def add_lookup(self, tokens: int) -> None:
        """Count a look into the prefix cache, which knew so many tokens."""
        self.cached_tokens += tokens
        if tokens:
            self.cache_hits += 1
        else:
            self.cache_misses += 1

    def add_finished(self, request: Request) -> None:
        """Count a request that has ended."""
        assert request.finish_reason is not None
        self._finished[request.finish_reason] += 1

    def metrics(self, *, slots: int, running: int, waiting: int, state_bytes: int) -> EngineMetrics:
        """The counts so far, beside how the engine stands."""
        reasons: tuple[FinishReason, ...] = ("stop", "length", "cancelled", "error")
        return EngineMetrics(
            slots=slots,
            running=running,
            waiting=waiting,
            state_bytes=state_bytes,
            steps=self.steps,
            step_seconds=self.step_seconds,
            last_step_seconds=self.last_step_seconds,
            submitted=self.submitted,
            refused=self.refused,
            finished={reason: self._finished[reason] for reason in reasons},
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            cache_hits=self.cache_hits,
            cache_misses=self.cache_misses,
            generated_tokens=self.generated_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )
