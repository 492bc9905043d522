"""What answers look like: OpenAI's objects, whole and in chunks."""

from collections.abc import Sequence
from typing import Any, Literal

from transnormer.data.tokenizers import Tokenizer
from transnormer.infer.sampling import TokenLogprobs
from transnormer.serve.answer import Token
from transnormer.serve.errors import Reply
from transnormer.serve.states import StateInfo

FinishReason = Literal["stop", "length"]


class PromptDetails(Reply):
    """Of a prompt's tokens."""

    cached_tokens: int
    """Those whose state was known from an earlier prompt."""


class Usage(Reply):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(Reply):
    """Log probabilities of the tokens of a completion, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One answer to one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Reply):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    state: StateInfo | None = None
    """The state after the answer, where it was asked for."""


class TopLogprob(Reply):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token that came, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log probabilities of the tokens of a chat's answer."""

    content: list[ChatLogprob]


class ChatAnswer(Reply):
    """A message of the model."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(Reply):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    state: StateInfo | None = None
    """The state after the answer, where it was asked for."""


class ModelCard(Reply):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parameters: int
    """Numbers in its weights."""
    state_bytes: int
    """Size of the state of a conversation."""
    state_bytes_per_token: int
    """What each token adds to it; 0 for a recurrent model."""
    chat_template: str
    """Where its chat template comes from."""


class ModelList(Reply):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Counts of tokens as clients read them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; a model may have more ids than its tokenizer."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as OpenAI's completions show it, different for different tokens.

    That is its text; "bytes:\\xe4" for bytes that are not UTF-8 by themselves, and "token_id:2" for
    a token without text.
    """
    data = _bytes(tokenizer, token)
    if not data:
        return f"token_id:{token}"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Log probabilities as parallel lists."""

    def top(logprobs: TokenLogprobs | None) -> dict[str, float] | None:
        if logprobs is None:
            return None
        return {token_name(tokenizer, token): value for token, value in logprobs.top}

    return {
        "tokens": [token_name(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprobs and token.logprobs.logprob for token in tokens],
        "top_logprobs": [top(token.logprobs) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Log probabilities, a table for each token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = _bytes(tokenizer, token)
        return {
            "token": data.decode(errors="replace") if data else token_name(tokenizer, token),
            "logprob": logprob,
            "bytes": list(data) or None,
        }

    content = []
    for token in tokens:
        assert token.logprobs is not None
        content.append(
            {
                **entry(token.id, token.logprobs.logprob),
                "top_logprobs": [entry(*pair) for pair in token.logprobs.top],
            }
        )
    return {"content": content}
