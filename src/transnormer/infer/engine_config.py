"""How much an engine does at once, and its refusal of more."""

from typing import Self

from pydantic import Field, model_validator

from transnormer.config import Config
from transnormer.ops.linear_attention.step import MAX_TOKENS


class QueueFull(RuntimeError):
    """The engine's queue has no room for a request; it was not taken.

    Attributes:
        waiting: requests in the queue.
        bound: requests that it takes now: the configured ones, and one for each free slot.
    """

    def __init__(self, waiting: int, bound: int) -> None:
        super().__init__(
            f"queue holds {waiting} requests; expected less than {bound}, one for each free slot "
            "and as many as config.queue; submit again when one has finished, or raise queue"
        )
        self.waiting, self.bound = waiting, bound


class EngineConfig(Config):
    """How much an engine does at once."""

    slots: int = Field(default=8, ge=1)
    """Requests that run at once; each holds a state of the model."""
    queue: int = Field(default=64, ge=0)
    """Requests that wait for a slot; one more is refused."""
    prefill_tokens: int = Field(default=2048, ge=1)
    """Tokens of prompts that a step reads at most, so that running requests wait no longer. A slot
    that reads has its share of them, prefill_tokens / slots, whatever the others do."""
    batch_invariant: bool = False
    """A request's logits are the same bits whatever runs beside it: prompts are read alone, in
    pieces of the share, and every decoding step has the shape of the full batch."""
    ring: int | None = None
    """Entries of the rings beside the states, see ``ops.RingState``; None writes a state each step.
    """
    compile: bool = False
    """Compile the model's blocks for decoding, in place (``compile_blocks``), which fuses what lies
    between its products; prompts, whose lengths differ, are read by the plain blocks."""
    fused: bool = False
    """Decode a TransNormerLLM by the kernels of ``FusedStep`` on a GPU, in few launches, or by
    ``CpuStep`` on a CPU, which reads weights at the memory's speed."""
    run_ahead: bool | None = None
    """Begin a step with the tokens of the one before while the host still looks at them, so that a
    GPU does not wait for the host; who has stopped at one is advanced once in vain. None: on a GPU,
    for models whose state has a constant size, without drafts."""
    draft_tokens: int = Field(default=0, ge=0, lt=MAX_TOKENS)
    """Tokens a step that prompt lookup drafts and the model then confirms; 0 drafts none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prefill_tokens < self.slots:
            raise ValueError(
                f"prefill_tokens is {self.prefill_tokens}; expected at least slots, {self.slots}, "
                "so that every slot reads a token a step"
            )
        if self.fused and self.compile:
            raise ValueError("fused is True; expected False with compile: choose one of them")
        if self.ring is not None and self.ring < 2 * (self.draft_tokens + 1):
            raise ValueError(
                f"ring is {self.ring}; expected at least {2 * (self.draft_tokens + 1)}, twice the "
                "tokens of a step, so that drafts can be taken back"
            )
        if self.run_ahead and self.draft_tokens:
            raise ValueError(
                f"draft_tokens is {self.draft_tokens}; expected 0 with run_ahead: drafts are made of "
                "tokens that the host has seen"
            )
        if self.batch_invariant and self.draft_tokens:
            raise ValueError(
                f"draft_tokens is {self.draft_tokens}; expected 0 with batch_invariant: a draft of "
                "one request changes the shape of the step for all"
            )
        return self
