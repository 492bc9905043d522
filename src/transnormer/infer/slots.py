"""The requests that run: each in a slot of the pool, and what a step does with all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.graphs import Arriving
from transnormer.infer.metrics import Tally
from transnormer.infer.pool import GrowingPool, StatePool
from transnormer.infer.prefix_cache import PrefixCache
from transnormer.infer.prompts import positions_of
from transnormer.infer.request import Request
from transnormer.infer.sampling import draw, placed, raised, token_logprobs, unusable_rows


class Ready(NamedTuple):
    """Slots whose next token is to be drawn.

    Attributes:
        slots: n of them.
        logits: [n, vocab_size].
        likeliest: as ``StepOutput``'s, [2, n], or None.
    """

    slots: list[int]
    logits: Tensor
    likeliest: Tensor | None = None


class Slots:
    """What the running requests have come to, and how a step takes them further.

    Args:
        pool: where their states are.
        config: of the engine.
        cache: snapshots of states after beginnings of prompts.
        limit: ids from here on are never drawn.
        tally: where tokens are counted.
    """

    def __init__(
        self,
        pool: StatePool,
        config: EngineConfig,
        cache: PrefixCache | None,
        limit: int | None,
        tally: Tally,
    ) -> None:
        self.pool = pool
        self.requests: list[Request | None] = [None] * config.slots
        self._config, self._cache, self._limit, self._tally = config, cache, limit, tally
        self._root = "" if cache is None else pool.model.fingerprint()
        self._keys: dict[int, list[bytes]] = {}
        self._positions = positions_of(pool.model.config)
        alone = config.batch_invariant and isinstance(pool, GrowingPool)
        self._largest = 1 if alone else config.slots
        if config.run_ahead and not pool.runs_ahead:
            raise NotImplementedError(
                "run_ahead is True; expected None or False for this model, whose state grows: the "
                "shape of a step follows from tokens that the host has seen"
            )
        able = pool.runs_ahead and pool.device.type == "cuda" and not config.draft_tokens
        self._runs_ahead = able if config.run_ahead is None else config.run_ahead
        # Of a step that runs before the host has seen its tokens; valid until the pool's next one.
        self._ahead: Ready | None = None

    @property
    def share(self) -> int:
        """Tokens of its prompt that a slot reads in a step at least."""
        return self._config.prefill_tokens // self._config.slots

    def steps_of(self, request: Request) -> int:
        """Steps that reading a request's prompt takes at most."""
        block = request.prompt_tokens if self._cache is None else self._cache.block_tokens
        whole, rest = divmod(request.prompt_tokens, block)
        return whole * -(-block // self.share) + -(-rest // self.share)

    def begin(self, slot: int, request: Request) -> None:
        """Bring the state that a request begins with into its slot."""
        state, request.initial_state = request.initial_state, None
        # Each token of a prompt is read where its probability is asked for.
        if state is None and self._cache is not None and request.prompt_logprobs_count is None:
            keys = self._keys[slot] = self._cache.keys(request.prompt, self._root)
            # The last token is always read: it gives the logits.
            block = self._cache.block_tokens
            blocks, state = self._cache.longest(keys[: (request.prompt_tokens - 1) // block])
            request.read_tokens = request.cached_tokens = blocks * block
            self._tally.add_lookup(request.cached_tokens)
        if state is None:
            self.pool.reset(slot)
        else:
            self.pool.write([slot], state.to(self.pool.device))
        if self._config.draft_tokens:
            request.look_up_drafts()

    def advance(self, step: int) -> None:
        """Read a piece of every prompt that is not read, and draw a token of every other request.

        Args:
            step: its number, which first tokens are marked with.
        """
        slots = [s for s, r in enumerate(self.requests) if r is not None and r.drawn]
        ready = self._prefill()
        if self._ahead is None:
            for start in range(0, len(slots), self._largest):
                ready += self._decode(slots[start : start + self._largest], step)
        elif slots:
            # All of them: it reads a token of each request that had one when it began.
            ready.append(self._of_those(slots, self._ahead))
        self._ahead = None
        if len(ready) > 1:
            # One draw for all: a device is waited for once.
            drawn = [slot for part in ready for slot in part.slots]
            ready = [Ready(drawn, torch.cat([part.logits for part in ready]))]
        for part in ready:
            self._draw(part, step)

    def _prefill(self) -> list[Ready]:
        packed, alone = [], []
        for part in self._pieces():
            apart = self._config.batch_invariant or part[1].prompt_logprobs_count is not None
            (alone if apart else packed).append(part)
        ready: list[Ready] = []
        for group in [*([packed] if packed else []), *([part] for part in alone)]:
            logits = self._read(group)
            whole: list[tuple[int, int]] = []
            for row, (slot, request, piece) in enumerate(group):
                request.read_tokens += len(piece)
                self._tally.prompt_tokens += len(piece)
                self._snapshot(slot, request)
                if request.read_tokens < request.prompt_tokens:
                    continue
                if request.max_new_tokens == 0:
                    request.finish_reason = "length"
                else:
                    whole.append((row, slot))
            if whole:
                rows = [row for row, _ in whole]
                ready.append(Ready([slot for _, slot in whole], logits[rows]))
        return ready

    def _read(self, group: Sequence[tuple[int, Request, Tensor]]) -> Tensor:
        """Read pieces of prompts in one call; logits after the last token of each."""
        pieces, slots = [piece for _, _, piece in group], [slot for slot, _, _ in group]
        request = group[0][1]
        if request.prompt_logprobs_count is None:
            return self.pool.prefill(pieces, slots)
        logits, first = self.pool.prefill(pieces, slots, every=True), request.ahead
        ids: list[int] = pieces[0].tolist()
        before = logits[:-1] if first is None else torch.cat([first, logits[:-1]])
        if first is None:
            request.prompt_logprobs.append(None)
        known, count = ids[-len(before) :] if len(before) else [], request.prompt_logprobs_count
        request.prompt_logprobs += token_logprobs(before, known, count, self._limit)
        # A copy: a view would keep the logits of the whole piece.
        request.ahead = logits[-1:].clone()
        return request.ahead

    def _pieces(self) -> list[tuple[int, Request, Tensor]]:
        """The tokens that each prompt reads in this step."""
        reading = [
            (slot, request)
            for slot, request in enumerate(self.requests)
            if request is not None and request.read_tokens < request.prompt_tokens
        ]
        wanted = []
        for slot, request in reading:
            start, end = request.read_tokens, request.prompt_tokens
            if slot in self._keys and self._cache is not None:
                block = self._cache.block_tokens
                end = min(end, (start // block + 1) * block)
            wanted.append(end - start)
        sizes = [min(self.share, size) for size in wanted]
        # What is left of the step goes to those that came first; alone, pieces are always alike.
        spare = 0 if self._config.batch_invariant else self._config.prefill_tokens - sum(sizes)
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
        if self._config.batch_invariant:
            return self._largest
        return min(self._largest, 1 << (count - 1).bit_length())

    def _decode(self, slots: list[int], step: int) -> list[Ready]:
        """Read the last tokens of some slots; their logits, unless drafts were confirmed at once."""
        unread = [self._request(slot).last_token for slot in slots]
        width, drafts = self._config.draft_tokens, []
        if self._may_draft(slots):
            drafts = [self._request(slot).draft(width) for slot in slots]
        rows = self._bucket(len(slots))
        if not any(drafts):
            logits = self.pool.decode(torch.tensor(unread)[:, None], slots, rows)
            best = self.pool.likeliest
            return [Ready(slots, logits[:, 0], None if best is None else best[..., 0])]
        ids = [[first, *draft, *[0] * (width - len(draft))] for first, draft in zip(unread, drafts)]
        logits = self.pool.verify(torch.tensor(ids), slots, rows)
        counts, going = [0] * len(slots), list(range(len(slots)))
        for place in range(width + 1):
            self._draw(Ready([slots[row] for row in going], logits[going, place]), step)
            for row in going:
                counts[row] += 1
            # A draft is right where it is the token that would have been drawn anyway.
            going = [
                row
                for row in going
                if place < len(drafts[row])
                and not self._request(slots[row]).finished
                and self._request(slots[row]).last_token == drafts[row][place]
            ]
            if not going:
                break
        self._tally.drafted_tokens += sum(map(len, drafts))
        self._tally.accepted_tokens += sum(counts) - len(counts)
        self.pool.keep(counts)
        return []

    def _may_draft(self, slots: list[int]) -> bool:
        """Whether every row has positions for the longest draft: all are filled up to its width."""
        if not self._config.draft_tokens:
            return False
        ends = [self._request(slot).position + self._config.draft_tokens for slot in slots]
        return max(ends) <= (self._positions or max(ends))

    def _draw(self, ready: Ready, step: int) -> None:
        """Draw the next token of some slots."""
        requests = [self._request(slot) for slot in ready.slots]
        logits = adjusted = ready.logits[:, : self._limit]
        choice = ready.likeliest
        if choice is None or not all(request.greedy for request in requests):
            adjusts = any(request.adjusts for request in requests)
            logits = adjusted = raised(ready.logits)
            if adjusts:
                pairs = zip(requests, logits, strict=True)
                adjusted = torch.stack([request.adjusted(row) for request, row in pairs])
            # Only now: a prompt or a bias may name ids that are never drawn.
            logits, adjusted = logits[:, : self._limit], adjusted[:, : self._limit]
            numbers = [request.uniform() for request in requests]
            uniforms = torch.tensor(numbers, dtype=torch.float64)
            drawn = draw(adjusted, [request.sampling for request in requests], uniforms)
            choice = torch.stack([drawn, unusable_rows(adjusted).long()])
        arriving = Arriving(choice)
        goes_on = any(request.drawn + 1 < request.max_new_tokens for request in requests)
        if self._runs_ahead and goes_on:
            if any(request.logprobs_count is not None for request in requests):
                logits = logits.clone()
            self._run_ahead(ready.slots, requests, choice[0])
            # In a graph's memory, where the next step is under way.
            adjusted = None if adjusted.is_cuda else adjusted
        # The one place where a step waits for the device, but for log probabilities.
        tokens, bad = arriving.read()
        self._tally.generated_tokens += len(tokens) - sum(bad)
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if bad[row]:
                request.fail_at(None if adjusted is None else adjusted[row].amax().item())
                continue
            if request.first_token_at is None:
                request.first_token_at = step
            if request.logprobs_count is not None:
                own = logits[row : row + 1]
                request.logprobs += token_logprobs(own, [token], request.logprobs_count)
            request.take(token)

    def _run_ahead(self, slots: list[int], requests: list[Request], ids: Tensor) -> None:
        """Begin the step that reads tokens which the host has not seen, int64 [n].

        Who reaches its number of tokens with them stays only for the state behind the last one.
        """
        rows = [
            row
            for row, request in enumerate(requests)
            if request.keep_state or request.drawn + 1 < request.max_new_tokens
        ]
        if len(rows) < len(slots):
            ids = ids[placed(rows, torch.int64, ids.device)]
            slots = [slots[row] for row in rows]
        logits = self.pool.decode(ids[:, None], slots, self._bucket(len(slots)))
        best = self.pool.likeliest
        self._ahead = Ready(slots, logits[:, 0], None if best is None else best[..., 0])

    def _of_those(self, slots: list[int], ahead: Ready) -> Ready:
        """The part of a step that ran ahead which belongs to some of its slots."""
        if slots == ahead.slots:
            return ahead
        found = [ahead.slots.index(slot) for slot in slots]
        rows = placed(found, torch.int64, ahead.logits.device)
        best = ahead.likeliest
        return Ready(slots, ahead.logits[rows], None if best is None else best[:, rows])

    def _request(self, slot: int) -> Request:
        request = self.requests[slot]
        assert request is not None
        return request

    def release(self, slot: int, request: Request) -> None:
        """Free the slot of a request that has finished."""
        read = request.read_tokens == request.prompt_tokens and request.error is None
        if request.keep_state and read:
            # A step that ran ahead has read it.
            known = self._ahead is not None and slot in self._ahead.slots
            if request.drawn and not known:
                last = torch.tensor([[request.last_token]])
                self.pool.decode(last, [slot], self._bucket(1))
            request.keep(self.pool.read([slot]))
        self.free(slot)

    def forget(self) -> None:
        """Leave a step that runs ahead alone: its requests have ended."""
        self._ahead = None

    def free(self, slot: int) -> None:
        """Empty a slot, whatever became of its request."""
        if isinstance(self.pool, GrowingPool):
            # A cache of a long text would stay in memory until the slot is used again.
            self.pool.reset(slot)
        self._keys.pop(slot, None)
        self.requests[slot] = None
