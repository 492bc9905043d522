"""From requests to answers: what they ask is checked and tokenised, and what comes is followed."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from transnormer.data.chat_template import ChatTemplate
from transnormer.data.tokenizers import Tokenizer
from transnormer.infer.text import begin_id
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder
from transnormer.serve.answer import Ask, Delta
from transnormer.serve.errors import ApiError
from transnormer.serve.metrics import Metrics
from transnormer.serve.runs import Run
from transnormer.serve.schema import ChatRequest, CompletionRequest, Prompt, Sampled
from transnormer.serve.serve_config import ServeConfig
from transnormer.serve.states import Kept, StateFiles, StateInfo, StateStore
from transnormer.serve.worker import Worker

COMPLETION_TOKENS, CHAT_TOKENS = 16, 512
# Prompts that are read and submitted at once. Python's threads take turns of 5 ms, so with many of
# them the event loop would seldom have its own, and short requests wait behind few long ones.
_READERS = 4
# Ids that NumPy takes in a millisecond or two, in which no other thread has its turn. torch.tensor is
# slower, and many short calls of it keep the others waiting as long as one for the whole list.
_BLOCK = 1 << 16
_Result = TypeVar("_Result")


class Service:
    """A model behind an engine, as the routes use it.

    Args:
        model: what is served.
        tokenizer: its tokenizer.
        name: what clients call it.
        template: how conversations become tokens, and where that comes from, as ``find_template``
            says it.
        config: limits.
        worker: owns the engine.
        metrics: where requests are counted.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        name: str,
        template: tuple[ChatTemplate, str],
        config: ServeConfig,
        worker: Worker,
        metrics: Metrics,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.template, self.template_from = template
        self.config, self.worker, self.metrics = config, worker, metrics
        self.cost = ModelCost.of(model.config, model.embedding.weight.dtype)
        # The model's own end, or else the tokenizer's, as with the token that texts begin with.
        eos = model.config.eos_token_id
        eos = tokenizer.eos_id if eos is None else eos
        self._ends = () if eos is None else (eos,)
        self._turn_ends = (*self._ends, *self._closing())
        self.states = StateStore(config.max_state_bytes)
        self.files = StateFiles(model)
        self.created = int(time.time())
        self.stopping = False
        self._runs: dict[str, Run] = {}
        self._readers = asyncio.Semaphore(_READERS)

    def _closing(self) -> list[int]:
        """The special token that the chat template closes an answer with, where it has one."""
        try:
            ids = self.template.follow([{"role": "user", "content": "question"}])
        except ValueError:
            # A template that keeps no earlier answers has no way to go on from one either.
            return []
        special = set(self.tokenizer.special_tokens.values()) - set(self._ends)
        return [token for token in ids[:1] if token in special]

    async def aside(self, work: Callable[[], _Result]) -> _Result:
        """Do what takes long for a long prompt in a thread, so that the event loop goes on.

        Who is cancelled does not wait for it, but its thread counts as one until it ends.
        """
        await self._readers.acquire()
        job = asyncio.ensure_future(run_in_threadpool(work))
        job.add_done_callback(self._after)
        return await asyncio.shield(job)

    def _after(self, job: asyncio.Future[Any]) -> None:
        self._readers.release()
        if not job.cancelled():
            # Asked for here, since nobody else may be there to see it.
            job.exception()

    def check_model(self, name: str | None) -> None:
        """Raise ApiError unless a request means the model that is served."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name[:80]!r} does not exist; expected {self.name!r}",
                param="model",
                code="model_not_found",
            )

    async def completions(self, body: CompletionRequest) -> list[Ask]:
        """What a request to /v1/completions asks, an entry an answer.

        Raises:
            ApiError, ValueError: what cannot be done.
        """
        kept = self._kept(body, len(body.prompt) * body.n)
        count = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        self._check_count("max_tokens", count)
        asks = []
        for prompt in body.prompt:
            read = partial(self._read, prompt, kept is None, bool(body.echo))
            ids, text = await self.aside(read)
            asks += self._asks(
                body,
                ids,
                text,
                count,
                kept,
                logprobs=body.logprobs,
                echo=bool(body.echo),
                ends=self._ends,
                # Only after the bos token alone does the answer begin a document.
                from_start=kept is None and prompt == "",
            )
        return asks

    async def chat(self, body: ChatRequest) -> list[Ask]:
        """What a request to /v1/chat/completions asks, an entry an answer.

        Raises:
            ApiError, ValueError: what cannot be done.
        """
        kept = self._kept(body, body.n)
        count = body.max_completion_tokens or body.max_tokens
        if count is None:
            count = min(CHAT_TOKENS, self.config.max_new_tokens)
        self._check_count("max_completion_tokens", count)
        ids = await self.aside(partial(self._converse, body, kept))
        top = (body.top_logprobs or 0) if body.logprobs else None
        return self._asks(
            body,
            ids,
            "",
            count,
            kept,
            logprobs=top,
            echo=False,
            ends=self._turn_ends,
            from_start=False,
        )

    def _kept(self, body: Sampled, choices: int) -> Kept | None:
        """The state that a request goes on from, after a look at what it asks for."""
        self.check_model(body.model)
        self._check_not_stopping()
        if choices > self.config.max_choices:
            raise ApiError(
                400,
                f"the request asks for {choices} answers; expected at most "
                f"{self.config.max_choices}, prompts times n",
                param="n",
            )
        if body.keep_state and not self.config.max_state_bytes:
            raise ApiError(400, "the server keeps no states; expected keep_state false")
        return None if body.state is None else self.states.get(body.state)

    def _check_not_stopping(self) -> None:
        if self.stopping:
            raise ApiError(503, "the server is stopping; try another", code="stopping")

    def _check_count(self, name: str, count: int) -> None:
        most = self.config.max_new_tokens
        if count > most:
            raise ApiError(400, f"{name} is {count}; expected at most {most}", param=name)

    def _asks(
        self,
        body: Sampled,
        ids: Tensor,
        text: str,
        count: int,
        kept: Kept | None,
        *,
        logprobs: int | None,
        echo: bool,
        ends: Sequence[int],
        from_start: bool,
    ) -> list[Ask]:
        seed = body.seed
        return [
            Ask(
                ids=ids,
                text=text,
                from_start=from_start,
                max_new_tokens=count,
                sampling=body.sampling(),
                seed=None if seed is None else (seed + choice) % 2**63,
                stop=tuple(body.stop),
                ends=ends,
                logprobs=logprobs,
                echo=echo,
                state=None if kept is None else kept.state,
                keep_state=body.keep_state,
            )
            for choice in range(body.n)
        ]

    def _read(self, prompt: Prompt, from_start: bool, echo: bool) -> tuple[Tensor, str]:
        """The ids of a prompt, and its text."""
        if isinstance(prompt, str):
            encode = self.tokenizer.encode if from_start else self.tokenizer.encode_inside
            begin = [begin_id(self.model, self.tokenizer)] if from_start else []
            return _as_ids([*begin, *encode(prompt)]), prompt
        return _as_ids(prompt), self.tokenizer.decode(prompt) if echo else ""

    def _converse(self, body: ChatRequest, kept: Kept | None) -> Tensor:
        """The ids of a conversation, or of what follows a state."""
        return _as_ids(self._conversation(body, kept))

    def _conversation(self, body: ChatRequest, kept: Kept | None) -> list[int]:
        messages = [message.plain() for message in body.messages]
        if kept is None:
            ids = self.template.encode(messages)
            # Any other template writes the tokens that a conversation begins with.
            plain = self.template_from == "plain"
            return [begin_id(self.model, self.tokenizer), *ids] if plain else ids
        ids = self.template.follow(messages)
        # The token that ended the answer is in the state, and the template writes it again.
        ended = kept.last_token is not None and ids[:1] == [kept.last_token]
        return ids[1:] if ended and kept.last_token in self._turn_ends else ids

    def prompt_tokens(self, asks: Sequence[Ask], n: int) -> int:
        """Tokens of all prompts; several answers to one prompt count it once."""
        return sum(len(ask.ids) for ask in asks[::n])

    async def start(self, name: str, asks: Sequence[Ask]) -> Run:
        """Hand requests to the engine; whoever gets the run closes it, however it goes.

        Args:
            name: id of the answer.
            asks: an entry an answer.

        Raises:
            ApiError: the server is stopping.
            QueueFull: the engine has no room for all of them.
            ValueError, TypeError: what the engine refuses.
        """
        self._check_not_stopping()
        run = self._runs[name] = Run(self, name, asks)
        try:
            await self.aside(run.submit)
        except BaseException:
            run.close()
            raise
        return run

    def forget(self, name: str) -> None:
        """A run is closed."""
        self._runs.pop(name, None)

    def stop(self) -> None:
        """Take no more requests, and give those that run ``drain_seconds``."""
        self.stopping = True
        for run in self._runs.values():
            run.hurry(self.config.drain_seconds)

    def end(self, name: str) -> bool:
        """End a request by the id of its answer, as a client asks; returns whether it ran."""
        run = self._runs.get(name)
        if run is not None:
            run.ended = True
            run.cancel()
        return run is not None

    def keep(self, delta: Delta) -> StateInfo | None:
        """Keep the state of a finished answer, where it has one."""
        if delta.state is None:
            return None
        return self.states.put(Kept(delta.state, delta.last_id))


def _as_ids(ids: Sequence[int]) -> Tensor:
    """The ids as int64 [tokens]; in blocks, between which other threads have their turn."""
    starts = range(0, max(len(ids), 1), _BLOCK)
    blocks = [np.array(ids[start : start + _BLOCK], dtype=np.int64) for start in starts]
    return torch.from_numpy(np.concatenate(blocks))


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{secrets.token_hex(12)}"
