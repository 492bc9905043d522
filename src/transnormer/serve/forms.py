"""The two forms of an answer, a completion's and a chat's, behind one interface."""

import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from transnormer.serve.answer import Delta
from transnormer.serve.replies import chat_logprobs, completion_logprobs
from transnormer.serve.schema import ChatRequest, CompletionRequest
from transnormer.serve.service import Service, new_id


class Form(ABC):
    """How an answer is written.

    Args:
        service: which model answers.
        logprobs: whether log probabilities are asked for.

    Attributes:
        id: of the answer.
    """

    kind: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, service: Service, *, logprobs: bool) -> None:
        self.id = new_id(self.kind)
        self.wants_logprobs = logprobs
        self._service = service
        self._created = int(time.time())

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """What every chunk, and the whole, begins with."""
        return {
            "id": self.id,
            "object": self.chunk_object if chunk else self.whole_object,
            "created": self._created,
            "model": self._service.name,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of an answer's first chunk, which holds no text; None where there is none."""
        return None

    @abstractmethod
    def choice(self, index: int, delta: Delta, *, chunk: bool) -> dict[str, Any]:
        """An answer, or a piece of one."""


class CompletionForm(Form):
    """Answers of /v1/completions."""

    kind, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        super().__init__(service, logprobs=body.logprobs is not None)

    def choice(self, index: int, delta: Delta, *, chunk: bool) -> dict[str, Any]:
        """A piece and a whole look alike."""
        logprobs = None
        if self.wants_logprobs and (delta.tokens or not chunk):
            logprobs = completion_logprobs(self._service.tokenizer, delta.tokens)
        return {
            "index": index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }


class ChatForm(Form):
    """Answers of /v1/chat/completions."""

    kind, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatRequest) -> None:
        super().__init__(service, logprobs=bool(body.logprobs))

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk says whose turn it is."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def choice(self, index: int, delta: Delta, *, chunk: bool) -> dict[str, Any]:
        """A piece has a delta, a whole a message."""
        logprobs = None
        if self.wants_logprobs and (delta.tokens or not chunk):
            logprobs = chat_logprobs(self._service.tokenizer, delta.tokens)
        if chunk:
            said: dict[str, Any] = {"delta": {"content": delta.text} if delta.text else {}}
        else:
            said = {"message": {"role": "assistant", "content": delta.text}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": delta.finish_reason}
