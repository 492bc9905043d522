"""An engine that continues many prompts at once from states of constant size.

It knows token ids and states, nothing of text or of the family of the model.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from transnormer.infer.engine_config import EngineConfig, QueueFull
from transnormer.infer.metrics import EngineMetrics, Tally
from transnormer.infer.pool import make_pool
from transnormer.infer.prefix_cache import PrefixCache
from transnormer.infer.prompts import (
    Stop,
    check_sampling,
    checked_count,
    checked_ids,
    checked_state,
    checked_stops,
    optional_count,
)
from transnormer.infer.request import OnFinish, Request, Until
from transnormer.infer.sampling import SamplingConfig
from transnormer.infer.slots import Slots
from transnormer.models.decoder import Decoder
from transnormer.models.state import DecoderState

_DEFAULT_SAMPLING = SamplingConfig()


class Engine:
    """Continuous batching: every step reads parts of new prompts and gives running requests a token.

    Requests are admitted in order as slots become free. A step reads at most ``prefill_tokens``
    tokens of prompts, then advances every running request, so a long prompt delays nobody for
    longer than a step, and ``Request.first_token_by`` is known when a request comes.

    ``submit`` and ``Request.cancel`` may be called from any thread, ``step`` from one at a time.
    Decoding runs in a few fixed shapes (powers of two up to ``slots``); on a GPU each is one CUDA
    graph, at any length of context. Runs in eval mode, without gradients.

    Args:
        model: a causal decoder; not to be changed while the engine lives.
        config: sizes; None is the default.
        prefix_cache: where states after beginnings of prompts are kept and looked for; may be
            shared by engines of one device.
        draw_below: ids from here on are never drawn, as if the model had no others.

    Raises:
        ValueError: a model that is not causal, a limit out of range.
        NotImplementedError: rings for a model without constant decay; rings, compilation or fused
            steps for one whose state grows; a model that fused steps do not serve.
        RuntimeError: fused steps where Triton does not run.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig | None = None,
        *,
        prefix_cache: PrefixCache | None = None,
        draw_below: int | None = None,
    ) -> None:
        if not model.config.causal:
            raise ValueError("config.causal is False; expected True: only a causal model generates")
        draw_below = optional_count("draw_below", draw_below)
        if draw_below == 0:
            raise ValueError("draw_below is 0; expected at least 1")
        self.model, self.config = model, config or EngineConfig()
        self.pool = make_pool(
            model,
            self.config.slots,
            ring=self.config.ring,
            compiled=self.config.compile,
            fused=self.config.fused,
            draw_below=draw_below,
        )
        self.steps = 0
        self._tally = Tally()
        self._slots = Slots(self.pool, self.config, prefix_cache, draw_below, self._tally)
        self._queue: deque[Request] = deque()
        self._lock, self._stepping = threading.Lock(), threading.Lock()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(request is not None for request in self._slots.requests)

    def metrics(self) -> EngineMetrics:
        """What the engine has done, and how it stands; from any thread, during a step too."""
        return self._tally.metrics(
            slots=self.config.slots,
            running=self.running,
            waiting=self.waiting,
            state_bytes=self.pool.nbytes,
        )

    def submit(
        self,
        prompt: Tensor | Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = _DEFAULT_SAMPLING,
        seed: int | None = None,
        stop: Stop | None = None,
        until: Until | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        state: DecoderState | None = None,
        keep_state: bool = False,
        on_finish: OnFinish | None = None,
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt: ids, [tokens].
            max_new_tokens: largest number of tokens; 0 only reads the prompt.
            sampling: how its tokens are drawn.
            seed: its draws depend on this alone, and are those of row 0 of ``generate``; None takes
                one from torch's generator.
            stop: as ``generate``'s.
            until: called with the ids drawn so far after each token; true ends the request. An
                exception of it ends the request with that error.
            logprobs: record the log probability of each token and of this many likeliest ones.
            prompt_logprobs: the same of each token of the prompt, which is then read by itself and
                without the prefix cache. None for the first one, also after a ``state``.
            state: what came before the prompt, one row, as of an earlier request; not modified, so
                that any number of requests may go on from it.
            keep_state: give the state after the last token in ``Request.state``.
            on_finish: called once with the request by the thread that steps, when it has ended for
                whatever reason and its slot is free. An exception of it becomes the request's error.

        Raises:
            QueueFull: the queue is full; nothing was taken.
            ValueError, TypeError: as ``generate``; a state of another shape than this model's.
        """
        ids = torch.as_tensor(prompt).cpu()
        if ids.dim() != 1:
            raise ValueError(f"prompt has shape {list(ids.shape)}; expected [tokens]")
        config = self.model.config
        # The caller may fill the same tensor with the next prompt while this one waits.
        ids = checked_ids("prompt", ids, config.vocab_size).clone()
        max_new_tokens = checked_count("max_new_tokens", max_new_tokens)
        check_sampling(sampling, config.vocab_size)
        state = checked_state(state, self.model, ids, max_new_tokens)
        request = Request(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=int(torch.randint(2**62, ())) if seed is None else checked_count("seed", seed),
            stops=checked_stops(stop, config),
            until=until,
            logprobs=optional_count("logprobs", logprobs),
            prompt_logprobs=optional_count("prompt_logprobs", prompt_logprobs),
            state=state,
            keep_state=keep_state,
            on_finish=on_finish,
            run=self.step,
        )
        self._enqueue(request)
        return request

    def _enqueue(self, request: Request) -> None:
        slots = self._slots
        with self._lock:
            busy = [other for other in (*slots.requests, *self._queue) if other is not None]
            bound = self.config.queue + slots.requests.count(None)
            if len(self._queue) >= bound:
                self._tally.refused += 1
                raise QueueFull(len(self._queue), bound)
            # A slot that is not free has work, so it is free when all work ahead is shared out.
            ahead = sum(slots.steps_of(other) + other.max_new_tokens for other in busy)
            request.submitted_at = self.steps
            request.first_token_by = (
                self.steps + ahead // self.config.slots + slots.steps_of(request)
            )
            self._queue.append(request)
            self._tally.submitted += 1

    def step(self) -> bool:
        """Give every running request a token; returns whether there is work left.

        An exception of the model, or an interrupt, ends every running request with an error: how
        far their states have come is not known. Those that wait are served by the next steps.

        Raises:
            RuntimeError: a step is running, in another thread or around an ``until``.
        """
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError(
                "a step is running; expected one at a time; call step, run and result from one "
                "thread, and not from until"
            )
        began = time.perf_counter()
        try:
            return self._step()
        except BaseException as error:
            self._abandon(error)
            raise
        finally:
            self._tally.add_step(time.perf_counter() - began)
            self._stepping.release()

    def _abandon(self, cause: BaseException) -> None:
        """End all that runs: a step that broke off may have advanced some states and not others."""
        self._slots.forget()
        for slot, request in enumerate(self._slots.requests):
            if request is None:
                continue
            if request.keep_state or not request.finished:
                error = RuntimeError(f"a step broke off with {cause!r}; submit the request again")
                error.__cause__ = cause
                request.fail(error)
            self._slots.free(slot)
            self._end(request)

    def _end(self, request: Request) -> None:
        """Count a request that has ended, and tell its caller."""
        self._tally.add_finished(request)
        request.report()

    def _step(self) -> bool:
        self.steps += 1
        self._admit()
        self._slots.advance(self.steps)
        for slot, request in enumerate(self._slots.requests):
            if request is not None and request.finished:
                self._slots.release(slot, request)
                self._end(request)
        if not self.running:
            self._slots.forget()
        return bool(self._queue) or self.running > 0

    def run(self) -> None:
        """Step until every request has finished."""
        while self.step():
            pass

    def _admit(self) -> None:
        """End what was cancelled, and give free slots to those that wait longest."""
        running = self._slots.requests
        for slot, request in enumerate(running):
            if request is not None and request.cancelled:
                request.finish_reason = "cancelled"
                self._slots.release(slot, request)
                self._end(request)
        with self._lock:
            dropped = [request for request in self._queue if request.cancelled]
            for request in dropped:
                self._queue.remove(request)
            free = [slot for slot, request in enumerate(running) if request is None]
            admitted = [(slot, self._queue.popleft()) for slot in free[: len(self._queue)]]
            for slot, request in admitted:
                running[slot] = request
        for request in dropped:
            request.finish_reason = "cancelled"
            self._end(request)
        for slot, request in admitted:
            self._slots.begin(slot, request)
