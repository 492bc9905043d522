"""What comes of a request: text and tokens on their way from the engine to a reader."""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from transnormer.data.tokenizers import StreamDecoder, Tokenizer
from transnormer.infer.request import Request
from transnormer.infer.sampling import SamplingConfig, TokenLogprobs
from transnormer.infer.text import StopText
from transnormer.models.state import DecoderState


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt and how it is continued, checked and tokenised.

    Attributes:
        ids: the prompt, int64 [tokens].
        text: the prompt's text.
        from_start: whether the answer begins a document.
        max_new_tokens, sampling, seed, logprobs, state, keep_state: as of ``Engine.submit``.
        stop: texts that end the answer.
        ends: ids that end it.
        echo: whether the prompt is given back before the answer.
    """

    ids: Tensor
    text: str
    from_start: bool
    max_new_tokens: int
    sampling: SamplingConfig
    seed: int | None
    stop: Sequence[str]
    ends: Sequence[int]
    logprobs: int | None
    echo: bool
    state: DecoderState | None
    keep_state: bool


class Token(NamedTuple):
    """A token of an answer.

    Attributes:
        id: its id.
        logprobs: what the model thought of it, None for the first of a prompt.
        offset: characters of the answer before it.
    """

    id: int
    logprobs: TokenLogprobs | None
    offset: int


@dataclass
class Delta:
    """What an answer has got since the last look.

    Attributes:
        text: further text.
        tokens: further tokens, where log probabilities were asked for.
        count: tokens drawn.
        cached: tokens of the prompt that were known, of a finished answer.
        finish_reason: of a finished answer.
        error: why it ended, where that was an error.
        state: after the last token, on the CPU, where it was asked for.
        last_id: the last token that the state has read.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    count: int = 0
    cached: int = 0
    finish_reason: str | None = None
    error: Exception | None = None
    state: DecoderState | None = None
    last_id: int | None = None

    def add(self, later: "Delta") -> None:
        """Append what came later."""
        self.text += later.text
        self.tokens += later.tokens
        self.count += later.count
        self.cached = later.cached
        self.finish_reason, self.error = later.finish_reason, later.error
        self.state, self.last_id = later.state, later.last_id


class Mailbox:
    """Where a reader finds what its answers have got; used by the thread of the event loop alone.

    What is not fetched at once is joined, so that a reader who comes late gets all of it in one
    piece, and nothing waits for him.

    Args:
        limit: tokens that may wait here.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._tokens = limit, 0
        self._waiting: dict[int, Delta] = {}
        self._filled = asyncio.Event()

    def put(self, index: int, delta: Delta) -> bool:
        """Add to an answer; returns whether there is room for more."""
        if index in self._waiting:
            self._waiting[index].add(delta)
        else:
            self._waiting[index] = delta
        self._tokens += delta.count
        self._filled.set()
        return self._tokens <= self._limit

    async def get(self) -> dict[int, Delta]:
        """Wait until there is something, and take all of it: each answer's index and news."""
        await self._filled.wait()
        self._filled.clear()
        news, self._waiting, self._tokens = self._waiting, {}, 0
        return news


class Answer:
    """One answer as it grows. The engine's thread calls ``until`` and ``collect``, nobody else.

    Args:
        ask: what was asked.
        tokenizer: of the model.
        index: among the answers of one request.
        mailbox: where its news go.
    """

    def __init__(self, ask: Ask, tokenizer: Tokenizer, index: int, mailbox: Mailbox) -> None:
        self.ask, self.index, self.mailbox = ask, index, mailbox
        self.until = StopText(tokenizer, ask.stop, from_start=ask.from_start)
        self._tokenizer = tokenizer
        self._seen = 0
        self._echoed = not ask.echo
        # Characters given, and those of tokens whose text is not yet certain too.
        self._given = self._length = 0
        self._spans = StreamDecoder(tokenizer, from_start=ask.from_start)
        self._open: deque[Token] = deque()

    def collect(self, request: Request) -> Delta | None:
        """What is new since the last call, None where nothing is."""
        count = request.drawn
        if count == self._seen and not request.finished:
            return None
        delta = Delta(count=count - self._seen)
        if not self._echoed and (count or request.error is None):
            self._echo(request, delta)
        delta.text += self._text(request)
        if self.ask.logprobs is not None:
            fresh = slice(self._seen, count)
            self._note(zip(request.token_ids[fresh], request.logprobs[fresh], strict=True))
            delta.tokens += self._settled(request.finished)
        self._seen = count
        if request.finished:
            self._finish(request, delta)
        return delta

    def _text(self, request: Request) -> str:
        pieces, self.until.pieces = self.until.pieces, []
        if request.finished:
            pieces.append(self.until.finish())
        text = "".join(pieces)
        self._given += len(text)
        return text

    def _echo(self, request: Request, delta: Delta) -> None:
        """Give the prompt back."""
        self._echoed = True
        delta.text = self.ask.text
        if self.ask.logprobs is None:
            return
        at, spans = 0, StreamDecoder(self._tokenizer, from_start=True)
        for token, logprobs in zip(request.prompt.tolist(), request.prompt_logprobs):
            delta.tokens.append(Token(token, logprobs, at))
            at += len(spans.push(token))
        self._given = self._length = len(self.ask.text)

    def _note(self, tokens: Iterable[tuple[int, TokenLogprobs]]) -> None:
        for token, logprobs in tokens:
            self._open.append(Token(token, logprobs, self._length))
            self._length += len(self._spans.push(token))

    def _settled(self, finished: bool) -> list[Token]:
        """Tokens that the text given reaches; in the end all, but those of a stop string."""
        every = finished and not self.until.stopped
        tokens = []
        while self._open and (every or self._open[0].offset < self._given):
            tokens.append(self._open.popleft())
        return tokens

    def _finish(self, request: Request, delta: Delta) -> None:
        delta.finish_reason, delta.error = request.finish_reason, request.error
        delta.cached = request.cached_tokens
        if self.ask.keep_state and request.error is None and request.read_tokens:
            whole = request.read_tokens == request.prompt_tokens
            # Copied here: no other thread may speak to a GPU while the engine does.
            delta.state = request.state.to("cpu") if whole else None
            delta.last_id = [*request.prompt[-1:].tolist(), *request.token_ids[-1:]][-1]
