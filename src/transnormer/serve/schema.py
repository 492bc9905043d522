"""What requests hold: OpenAI's fields, and a few more that the engine has."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from transnormer.infer.sampling import SamplingConfig

MAX_TOP_LOGPROBS = 20
_MAX_ID = 2**31 - 1
_ID_SCHEMA = {"type": "integer", "minimum": 0, "maximum": _MAX_ID}
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 1024}
_IDS_SCHEMA = {"type": "array", "items": _ID_SCHEMA, "minItems": 1}
_TEXTS_SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 1}

Ids = list[int]
Prompt = str | Ids


def _prompts(value: Any) -> list[Prompt]:
    """Every form of ``prompt`` as a list of texts and lists of ids."""
    wrong = "prompt is {}; expected a text, a list of token ids, or a list of either"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(wrong.format(f"a {type(value).__name__}"))
    if not value:
        raise ValueError(wrong.format("an empty list"))
    if all(isinstance(item, str) for item in value):
        return value
    if _is_ids(value):
        return [value]
    if not all(isinstance(item, list) and _is_ids(item) for item in value):
        raise ValueError(wrong.format("a list of other things"))
    return value


def _is_ids(value: list[Any]) -> bool:
    """Whether a list holds token ids alone, at least one."""
    return bool(value) and all(type(item) is int and 0 <= item <= _MAX_ID for item in value)


def _stops(value: Any) -> list[str]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    fits = isinstance(values, list) and len(values) <= 16
    if not fits or not all(isinstance(item, str) and 0 < len(item) <= 1024 for item in values):
        raise ValueError("stop is no text of 1 to 1,024 characters, nor a list of at most 16 such")
    return values


Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _TEXTS_SCHEMA,
                _IDS_SCHEMA,
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]
Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "null"},
                _STOP_SCHEMA,
                {"type": "array", "items": _STOP_SCHEMA, "maxItems": 16},
            ]
        }
    ),
]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    """Unknown fields are refused, and no type becomes another."""

    model_config = ConfigDict(
        extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class StreamOptions(_Strict):
    """How a stream goes."""

    include_usage: bool = False
    """Send the counts of tokens in a last chunk."""
    continuous_usage_stats: bool = False
    """Send the counts so far in every chunk. Not one of OpenAI's fields."""
    include_obfuscation: bool = False
    """Accepted and without effect: nothing is padded."""


class Sampled(_Strict):
    """What both kinds of requests have."""

    model: str | None = None
    """A name that /v1/models gives; left out, the model that is served."""
    n: int = Field(default=1, ge=1, le=128)
    """Answers for each prompt; the second has the seed after the first's, and so on."""
    stream: bool | None = False
    """Send the answer as it comes, by server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with stream."""
    stop: Stops = []
    """Texts that end the answer and do not belong to it."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    """The same seed draws the same tokens."""
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] | None = None
    """Divides the logits; 0 takes the likeliest token, 1 is the default."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None = None
    """Draw from the likeliest tokens whose probabilities reach this sum."""
    top_k: Annotated[int, Field(ge=1, le=_MAX_ID)] | None = None
    """Draw from so many of the likeliest tokens. Not one of OpenAI's fields."""
    min_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None = None
    """Draw from tokens at least this share as likely as the likeliest. Not one of OpenAI's."""
    repetition_penalty: Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)] | None = None
    """Divides the logits of tokens that were there before. Not one of OpenAI's."""
    presence_penalty: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None = None
    """Taken off the logits of tokens that the answer holds."""
    frequency_penalty: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] | None = None
    """Taken off the logits of tokens as often as the answer holds them."""
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias], Field(max_length=1024)
        ]
        | None
    ) = None
    """What is added to the logits of tokens, by their ids: every step pays for each."""
    state: str | None = None
    """Id of a state that the prompt goes on from. Not one of OpenAI's."""
    keep_state: bool = False
    """Keep the state after the answer and give its id. Not one of OpenAI's."""
    user: Any = None
    """Accepted and without effect, as metadata, store and service_tier."""
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    @model_validator(mode="after")
    def _fits(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given without stream; expected stream true")
        if self.keep_state and self.n > 1:
            raise ValueError(f"keep_state is true with n {self.n}; expected n 1: one state is kept")
        return self

    def sampling(self) -> SamplingConfig:
        """How tokens are drawn; raises ValueError for what cannot be."""
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        bias = tuple((int(token), value) for token, value in (self.logit_bias or {}).items())
        return SamplingConfig.model_validate(given | {"logit_bias": bias})


class CompletionRequest(Sampled):
    """The body of /v1/completions."""

    prompt: Prompts
    """A text, ids, or a list of either. A text without a state begins with the bos token."""
    max_tokens: int | None = Field(default=None, ge=0)
    """Tokens of an answer; 16 where it is left out, 0 with echo only scores the prompt."""
    echo: bool | None = False
    """Give the prompt back before the answer, with its log probabilities where they are asked."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """The log probability of each token and of this many likeliest."""
    best_of: int | None = None
    """Accepted where it is n."""
    suffix: None = None
    """Not supported."""

    @model_validator(mode="after")
    def _possible(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of is {self.best_of}; expected n, {self.n}, or nothing")
        if self.max_tokens == 0 and not (self.echo or self.keep_state):
            raise ValueError("max_tokens is 0; expected at least 1 without echo or keep_state")
        if len(self.prompt) > 1 and (self.state is not None or self.keep_state):
            raise ValueError(f"prompt holds {len(self.prompt)} texts; expected one with a state")
        return self


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Whose turn it is."""
    content: str | list[TextPart]
    """What was said."""
    name: str | None = None
    """Of the speaker, for templates that show it."""

    def plain(self) -> dict[str, str]:
        """The message as a template reads it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": content, **named}


class TextFormat(_Strict):
    """The one form of an answer."""

    type: Literal["text"]


class ChatRequest(Sampled):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation, or with a state what follows it."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """As max_completion_tokens, which counts where both are given."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of the answer; 512 where it is left out."""
    logprobs: bool | None = False
    """Give the log probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """And of this many likeliest; needs logprobs."""
    response_format: TextFormat | None = None
    """Text is all there is."""
    tools: list[None] | None = Field(default=None, max_length=0)
    """Not supported; an empty list is accepted."""

    @model_validator(mode="after")
    def _possible(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(
                f"top_logprobs is {self.top_logprobs} without logprobs; expected logprobs true"
            )
        return self
