"""From requests to answers: what they ask is checked and tokenised, and what comes is followed."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence

import torch
from starlette.concurrency import run_in_threadpool

from transnormer.data.chat_template import ChatTemplate
from transnormer.data.tokenizers import Tokenizer
from transnormer.infer.text import begin_id
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder
from transnormer.serve.answer import Answer, Ask, Delta, Mailbox
from transnormer.serve.errors import ApiError, as_api_error
from transnormer.serve.metrics import Metrics
from transnormer.serve.schema import ChatRequest, CompletionRequest, Prompt, Sampled
from transnormer.serve.serve_config import ServeConfig
from transnormer.serve.states import Kept, StateFiles, StateInfo, StateStore
from transnormer.serve.worker import Worker

COMPLETION_TOKENS, CHAT_TOKENS = 16, 512


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

    def _closing(self) -> list[int]:
        """The special token that the chat template closes an answer with, where it has one."""
        try:
            ids = self.template.follow([{"role": "user", "content": "question"}])
        except ValueError:
            # A template that keeps no earlier answers has no way to go on from one either.
            return []
        special = set(self.tokenizer.special_tokens.values()) - set(self._ends)
        return [token for token in ids[:1] if token in special]

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
            ids, text = await run_in_threadpool(self._read, prompt, kept is None, bool(body.echo))
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
        ids = await run_in_threadpool(self._converse, body, kept)
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
        if self.stopping:
            raise ApiError(503, "the server is stopping; try another", code="stopping")
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

    def _check_count(self, name: str, count: int) -> None:
        most = self.config.max_new_tokens
        if count > most:
            raise ApiError(400, f"{name} is {count}; expected at most {most}", param=name)

    def _asks(
        self,
        body: Sampled,
        ids: list[int],
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
                ids=torch.tensor(ids, dtype=torch.int64),
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

    def _read(self, prompt: Prompt, from_start: bool, echo: bool) -> tuple[list[int], str]:
        """The ids of a prompt, and its text."""
        if isinstance(prompt, str):
            if not from_start:
                return self.tokenizer.encode_inside(prompt), prompt
            return [begin_id(self.model, self.tokenizer), *self.tokenizer.encode(prompt)], prompt
        return prompt, self.tokenizer.decode(prompt) if echo else ""

    def _converse(self, body: ChatRequest, kept: Kept | None) -> list[int]:
        """The ids of a conversation, or of what follows a state."""
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

    def start(self, name: str, asks: Sequence[Ask]) -> "Run":
        """Hand requests to the engine; whoever calls this closes the run, however it goes.

        Args:
            name: id of the answer.
            asks: an entry an answer.

        Raises:
            QueueFull: the engine has no room for all of them.
            ValueError, TypeError: what the engine refuses.
        """
        run = self._runs[name] = Run(self, name, asks)
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


class Run:
    """The answers of one HTTP request while they come.

    Args:
        service: whose engine answers.
        name: id of the answer.
        asks: an entry an answer.

    Attributes:
        ended: its client has asked that it ends here.
    """

    def __init__(self, service: Service, name: str, asks: Sequence[Ask]) -> None:
        self.ended = False
        self._service, self._name = service, name
        self._deadline = asyncio.get_running_loop().time() + service.config.request_seconds
        self._timeout: asyncio.Timeout | None = None
        self._mailbox = Mailbox(service.config.stream_tokens)
        answers = [
            Answer(ask, service.tokenizer, index, self._mailbox) for index, ask in enumerate(asks)
        ]
        self._began = time.perf_counter()
        self._requests = service.worker.submit(answers)
        self._open = set(range(len(asks)))

    def cancel(self) -> None:
        """End all that has not ended."""
        for request in self._requests:
            if not request.finished:
                request.cancel()

    def hurry(self, seconds: float) -> None:
        """Leave so much time from now on, if there was more."""
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + seconds)
        if self._timeout is not None:
            self._timeout.reschedule(self._deadline)

    def close(self) -> None:
        """Cancel, and let go of the id."""
        self._service.forget(self._name)
        self.cancel()

    async def news(self) -> AsyncIterator[tuple[int, Delta]]:
        """Each answer's news as they come, to the end of the last.

        Raises:
            ApiError: the time is over, or an answer ended with an error.
        """
        first = True
        while self._open:
            news = await self._next()
            if first:
                self._service.metrics.first_token.observe(time.perf_counter() - self._began)
                first = False
            for index, delta in sorted(news.items()):
                self._check(delta)
                if delta.finish_reason is not None:
                    self._open.discard(index)
                yield index, delta

    async def _next(self) -> dict[int, Delta]:
        """What comes next."""
        try:
            async with asyncio.timeout_at(self._deadline) as self._timeout:
                return await self._mailbox.get()
        except TimeoutError:
            if self._service.stopping:
                raise ApiError(503, "the server is stopping", code="stopping") from None
            raise ApiError(
                504,
                f"no answer within {self._service.config.request_seconds:g} seconds; expected "
                "fewer tokens or less load",
                code="timeout",
            ) from None
        finally:
            self._timeout = None

    def _check(self, delta: Delta) -> None:
        if delta.error is not None:
            raise as_api_error(delta.error) from delta.error
        if delta.finish_reason != "cancelled":
            return
        if not self.ended:
            raise ApiError(
                503,
                "the request was ended: its reader is slower than "
                f"{self._service.config.stream_tokens} tokens, or the server is stopping",
                code="cancelled",
            )
        delta.finish_reason = "stop"


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{secrets.token_hex(12)}"
