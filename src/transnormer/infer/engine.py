"""An engine that continues many prompts at once from states of constant size.

It knows token ids and states, nothing of text or of the family of the model.
"""

import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from transnormer.infer.engine_config import EngineConfig, QueueFull
from transnormer.infer.pool import GrowingPool, make_pool
from transnormer.infer.prefix_cache import PrefixCache
from transnormer.infer.prompts import (
    Stop,
    check_counts,
    check_sampling,
    checked_ids,
    checked_state,
    checked_stops,
    positions_of,
)
from transnormer.infer.request import Request, Until
from transnormer.infer.sampling import SamplingConfig, draw, raised, token_logprobs, unusable_rows
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
        NotImplementedError: rings for a model without constant decay; rings or compilation for
            one whose state grows.
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
        if draw_below is not None and draw_below < 1:
            raise ValueError(f"draw_below is {draw_below}; expected at least 1")
        check_counts(draw_below=draw_below)
        self.model, self.config = model, config or EngineConfig()
        self.pool = make_pool(
            model, self.config.slots, ring=self.config.ring, compiled=self.config.compile
        )
        self.steps = 0
        self._cache, self._limit = prefix_cache, draw_below
        self._root = "" if prefix_cache is None else model.fingerprint()
        self._queue: deque[Request] = deque()
        self._running: list[Request | None] = [None] * self.config.slots
        self._keys: dict[int, list[bytes]] = {}
        self._lock, self._stepping = threading.Lock(), threading.Lock()
        self._positions = positions_of(model.config)
        alone = self.config.batch_invariant and isinstance(self.pool, GrowingPool)
        self._largest = 1 if alone else self.config.slots

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(request is not None for request in self._running)

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
        state: DecoderState | None = None,
        keep_state: bool = False,
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt: ids, [tokens].
            max_new_tokens: largest number of tokens; 0 only reads the prompt.
            sampling: how its tokens are drawn.
            seed: its draws depend on this alone, and are those of row 0 of ``generate``; None takes
                one from torch's generator.
            stop: as ``generate``'s.
            until: called with ``token_ids`` after each token; true ends the request. An exception
                of it ends the request with that error.
            logprobs: record the log probability of each token and of this many likeliest ones.
            state: what came before the prompt, one row, as of an earlier request; not modified, so
                that any number of requests may go on from it.
            keep_state: give the state after the last token in ``Request.state``.

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
        check_counts(max_new_tokens=max_new_tokens, logprobs=logprobs, seed=seed)
        check_sampling(sampling, config.vocab_size)
        state = checked_state(state, self.model, ids, max_new_tokens)
        request = Request(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
            stops=checked_stops(stop, config),
            until=until,
            logprobs=logprobs,
            state=state,
            keep_state=keep_state,
            run=self.step,
        )
        with self._lock:
            busy = [other for other in (*self._running, *self._queue) if other is not None]
            if len(self._queue) >= self.config.queue + self._running.count(None):
                raise QueueFull(
                    f"queue holds {len(self._queue)} requests; expected at most "
                    f"{self.config.queue}; submit again when one has finished, or raise queue"
                )
            # A slot that is not free has work, so it is free when all work ahead is shared out.
            ahead = sum(self._steps_of(other) + other.max_new_tokens for other in busy)
            request.submitted_at = self.steps
            request.first_token_by = (
                self.steps + ahead // self.config.slots + self._steps_of(request)
            )
            self._queue.append(request)
        return request

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
        try:
            return self._step()
        except BaseException as error:
            self._abandon(error)
            raise
        finally:
            self._stepping.release()

    def _abandon(self, cause: BaseException) -> None:
        """End all that runs: a step that broke off may have advanced some states and not others."""
        for slot, request in enumerate(self._running):
            if request is None:
                continue
            if request.keep_state or not request.finished:
                error = RuntimeError(f"a step broke off with {cause!r}; submit the request again")
                error.__cause__ = cause
                request.fail(error)
            self._free(slot)

    def _step(self) -> bool:
        self.steps += 1
        self._admit()
        slots = [s for s, r in enumerate(self._running) if r is not None and r.token_ids]
        ready = self._prefill()
        for start in range(0, len(slots), self._largest):
            ready += self._decode(slots[start : start + self._largest])
        if ready:
            # One draw for all: a device is waited for once.
            self._draw([s for part, _ in ready for s in part], torch.cat([x for _, x in ready]))
        for slot, request in enumerate(self._running):
            if request is not None and request.finished:
                self._release(slot, request)
        return bool(self._queue) or self.running > 0

    def run(self) -> None:
        """Step until every request has finished."""
        while self.step():
            pass

    @property
    def _share(self) -> int:
        return self.config.prefill_tokens // self.config.slots

    def _steps_of(self, request: Request) -> int:
        """Steps that reading the request's prompt takes at most."""
        block = request.prompt_tokens if self._cache is None else self._cache.block_tokens
        whole, rest = divmod(request.prompt_tokens, block)
        return whole * -(-block // self._share) + -(-rest // self._share)

    def _admit(self) -> None:
        """End what was cancelled, and give free slots to those that wait longest."""
        for slot, request in enumerate(self._running):
            if request is not None and request.cancelled:
                request.finish_reason = "cancelled"
                self._release(slot, request)
        with self._lock:
            for request in [request for request in self._queue if request.cancelled]:
                request.finish_reason = "cancelled"
                self._queue.remove(request)
            free = [slot for slot, request in enumerate(self._running) if request is None]
            admitted = [(slot, self._queue.popleft()) for slot in free[: len(self._queue)]]
            for slot, request in admitted:
                self._running[slot] = request
        for slot, request in admitted:
            self._begin(slot, request)

    def _begin(self, slot: int, request: Request) -> None:
        state, request.initial_state = request.initial_state, None
        if state is None and self._cache is not None:
            keys = self._keys[slot] = self._cache.keys(request.prompt, self._root)
            # The last token is always read: it gives the logits.
            block = self._cache.block_tokens
            blocks, state = self._cache.longest(keys[: (request.prompt_tokens - 1) // block])
            request.read_tokens = request.cached_tokens = blocks * block
        if state is None:
            self.pool.reset(slot)
        else:
            self.pool.write([slot], state.to(self.pool.device))
        if self.config.draft_tokens:
            request.look_up_drafts()

    def _prefill(self) -> list[tuple[list[int], Tensor]]:
        """Read a piece of every prompt that is not read; the logits of those that now are."""
        parts = self._pieces()
        ready: list[tuple[list[int], Tensor]] = []
        alone = self.config.batch_invariant
        for group in [[part] for part in parts] if alone else [parts] if parts else []:
            logits = self.pool.prefill([x for _, _, x in group], [slot for slot, _, _ in group])
            whole: list[tuple[int, int]] = []
            for row, (slot, request, piece) in enumerate(group):
                request.read_tokens += len(piece)
                self._snapshot(slot, request)
                if request.read_tokens < request.prompt_tokens:
                    continue
                if request.max_new_tokens == 0:
                    request.finish_reason = "length"
                else:
                    whole.append((row, slot))
            if whole:
                ready.append(([slot for _, slot in whole], logits[[row for row, _ in whole]]))
        return ready

    def _pieces(self) -> list[tuple[int, Request, Tensor]]:
        """The tokens that each prompt reads in this step."""
        reading = [
            (slot, request)
            for slot, request in enumerate(self._running)
            if request is not None and request.read_tokens < request.prompt_tokens
        ]
        wanted = []
        for slot, request in reading:
            start, end = request.read_tokens, request.prompt_tokens
            if slot in self._keys and self._cache is not None:
                block = self._cache.block_tokens
                end = min(end, (start // block + 1) * block)
            wanted.append(end - start)
        sizes = [min(self._share, size) for size in wanted]
        # What is left of the step goes to those that came first; alone, pieces are always alike.
        spare = 0 if self.config.batch_invariant else self.config.prefill_tokens - sum(sizes)
        parts = []
        for (slot, request), size, most in zip(reading, sizes, wanted, strict=True):
            more = min(spare, most - size)
            spare -= more
            start = request.read_tokens
            parts.append((slot, request, request.prompt[start : start + size + more]))
        return parts

    def _snapshot(self, slot: int, request: Request) -> None:
        """Keep the state at the end of a block."""
        if slot not in self._keys or self._cache is None:
            return
        blocks, rest = divmod(request.read_tokens, self._cache.block_tokens)
        if rest == 0 and self._keys[slot][blocks - 1] not in self._cache:
            self._cache.put(self._keys[slot][blocks - 1], self.pool.read([slot]))

    def _bucket(self, count: int) -> int:
        """Rows of the batch that decodes ``count`` slots."""
        if self.config.batch_invariant:
            return self._largest
        return min(self._largest, 1 << (count - 1).bit_length())

    def _decode(self, slots: list[int]) -> list[tuple[list[int], Tensor]]:
        """Read the last tokens of some slots; their logits, unless drafts were confirmed at once."""
        unread = [[self._request(slot).token_ids[-1]] for slot in slots]
        width, drafts = self.config.draft_tokens, []
        if self._may_draft(slots):
            drafts = [self._request(slot).draft(width) for slot in slots]
        rows = self._bucket(len(slots))
        if not any(drafts):
            logits = self.pool.decode(torch.tensor(unread), slots, rows)
            return [(slots, logits[:, 0])]
        ids = [
            [*first, *draft, *[0] * (width - len(draft))] for first, draft in zip(unread, drafts)
        ]
        logits = self.pool.verify(torch.tensor(ids), slots, rows)
        counts, going = [0] * len(slots), list(range(len(slots)))
        for place in range(width + 1):
            self._draw([slots[row] for row in going], logits[going, place])
            for row in going:
                counts[row] += 1
            # A draft is right where it is the token that would have been drawn anyway.
            going = [
                row
                for row in going
                if place < len(drafts[row])
                and not self._request(slots[row]).finished
                and self._request(slots[row]).token_ids[-1] == drafts[row][place]
            ]
            if not going:
                break
        self.pool.keep(counts)
        return []

    def _may_draft(self, slots: list[int]) -> bool:
        """Whether every row has positions for the longest draft: all are filled up to its width."""
        ends = [self._request(slot).position + self.config.draft_tokens for slot in slots]
        return bool(self.config.draft_tokens) and max(ends) <= (self._positions or max(ends))

    def _draw(self, slots: list[int], logits: Tensor) -> None:
        """Draw the next token of some slots from logits [n, vocab_size]."""
        requests = [self._request(slot) for slot in slots]
        logits = adjusted = raised(logits)
        if any(request.adjusts for request in requests):
            pairs = zip(requests, logits, strict=True)
            adjusted = torch.stack([request.adjusted(row) for request, row in pairs])
        # Only now: a prompt or a bias may name ids that are never drawn.
        logits, adjusted = logits[:, : self._limit], adjusted[:, : self._limit]
        uniforms = torch.tensor([request.uniform() for request in requests], dtype=torch.float64)
        drawn = draw(adjusted, [request.sampling for request in requests], uniforms)
        # The one place where a step waits for the device, but for log probabilities.
        tokens, bad = torch.stack([drawn, unusable_rows(adjusted).long()]).tolist()
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if bad[row]:
                request.fail_at(adjusted[row].amax().item())
                continue
            if request.first_token_at is None:
                request.first_token_at = self.steps
            if request.logprobs_count is not None:
                request.logprobs.append(token_logprobs(logits[row], token, request.logprobs_count))
            request.take(token)

    def _request(self, slot: int) -> Request:
        request = self._running[slot]
        assert request is not None
        return request

    def _release(self, slot: int, request: Request) -> None:
        """Free the slot of a request that has finished."""
        read = request.read_tokens == request.prompt_tokens and request.error is None
        if request.keep_state and read:
            if request.token_ids:
                last = torch.tensor([request.token_ids[-1:]])
                self.pool.decode(last, [slot], self._bucket(1))
            request.keep(self.pool.read([slot]))
        self._free(slot)

    def _free(self, slot: int) -> None:
        if isinstance(self.pool, GrowingPool):
            # A cache of a long text would stay in memory until the slot is used again.
            self.pool.reset(slot)
        self._keys.pop(slot, None)
        self._running[slot] = None
