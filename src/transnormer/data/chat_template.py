"""Conversations as token ids: the chat template beside a tokenizer, as transformers keeps it."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from transnormer.data.tokenizers import Tokenizer
from transnormer.data.tokenizers.base import start_id

Message = Mapping[str, Any]

# A line for each message: for a model that was not tuned for dialogue.
PLAIN = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
_ROLES = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}
{{ SYSTEM }}
{% elif message.role == 'user' %}
{{ USER }}
{% elif message.role == 'assistant' %}
{{ ASSISTANT }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{% else %}
{{ raise_exception('role is ' ~ message.role ~ '; expected system, user or assistant') }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ ASSISTANT }}{% endif %}"""


def _with_roles(system: str, user: str, assistant: str) -> str:
    parts = {"SYSTEM": system, "USER": user, "ASSISTANT": assistant}
    source = _ROLES
    for name, expression in parts.items():
        source = source.replace(f"{{{{ {name} }}}}", f"{{{{ {expression} }}}}")
    # The line ends of the text above separate its blocks alone.
    return source.replace("\n", "")


TEMPLATES = {
    # The prompt of the released fine-tuning script (OpenNLPLab/TransnormerLLM, fine-tune/train.py).
    "released": _with_roles(
        "message.content + '\\n'", "'Human:\\n' + message.content + '\\n'", "'Assistant:\\n'"
    ),
    # Reserved tokens of the released models' vocabulary, which is Baichuan's, in the parts that
    # its chat models give them.
    "reserved": _with_roles(
        "message.content", "'<reserved_102>' + message.content", "'<reserved_103>'"
    ),
    "plain": PLAIN,
}
# The tokens that the template "reserved" writes: to a vocabulary without them they are mere text.
RESERVED = frozenset({"<reserved_102>", "<reserved_103>"})

# Code points that are no characters, so that text seldom holds them.
_MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"


class Encoded(NamedTuple):
    """A conversation.

    Attributes:
        ids: its tokens, the start token among them.
        answers: for each token whether it belongs to an answer: the assistant's text, and the
            end-of-text token that ends it.
    """

    ids: list[int]
    answers: list[bool]


class ChatTemplate:
    """A jinja2 template that makes one text of the messages of a conversation.

    It sees what templates of ``transformers``' ``apply_chat_template`` see: messages, tools and
    documents (None), add_generation_prompt, bos_token, eos_token, raise_exception, strftime_now and the block
    ``generation``, and runs in jinja2's sandbox, where it can change nothing. bos_token is the
    token that texts begin with: eos in vocabularies without bos.

    Names of special tokens that the template itself writes become their ids. Those that stand in a
    message's content stay text: nobody ends his turn, or begins another's, by writing it.

    Args:
        source: the template.
        tokenizer: of the model.
        name: of the template, for messages.

    Raises:
        ValueError: a template that jinja2 cannot read.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, name: str = "the chat template"
    ) -> None:
        self.source, self._name, self._tokenizer = source, name, tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        names: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": _now}
        environment.globals.update(names)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(
                f"{name} is not a chat template: {error}; expected jinja2 as transformers has it"
            ) from error
        self._specials = dict(tokenizer.special_tokens)
        named = {i: token for token, i in self._specials.items()}
        eos = tokenizer.eos_id
        self._names = {
            "bos_token": named.get(start_id(tokenizer), ""),
            "eos_token": "" if eos is None else named.get(eos, ""),
        }
        self._pattern = _any_of(self._specials)
        self._guarded = _any_of([*self._specials, *tokenizer.markers])

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, special tokens by their names.

        Raises:
            ValueError: messages that the template refuses.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        # A template is a program of somebody's, which may raise anything.
        except Exception as error:
            raise ValueError(
                f"messages do not fit the chat template: {error}; expected what {self._name} "
                "takes; change their roles or their order"
            ) from error

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation, of the answer's beginning too where the template has one.

        Raises:
            ValueError: messages that the template refuses, text that the tokenizer cannot express.
        """
        mark = _unused_mark(messages)
        shielded = [self._shielded(message, mark) for message in messages]
        return self._ids(self.render(shielded, add_generation_prompt=add_generation_prompt), mark)

    def follow(self, messages: Sequence[Message]) -> list[int]:
        """The ids of further messages after an answer whose end the model has not read.

        They begin with what closes the answer's turn. A state that has read the answer goes on from
        these ids as from those of the whole conversation.

        Raises:
            ValueError: as ``encode``.
        """
        mark = _unused_mark(messages)
        # What stands in for the conversation so far; only what follows its end is used.
        end = mark + "answer" + mark
        before = [{"role": "user", "content": "question"}, {"role": "assistant", "content": end}]
        text = self.render([*before, *(self._shielded(message, mark) for message in messages)])
        if end not in text:
            raise ValueError(
                f"{self._name} leaves out earlier answers; expected one that keeps them; send all "
                "messages and no state"
            )
        return self._ids(text[text.index(end) + len(end) :], mark, inside=True)

    def encode_answers(self, messages: Sequence[Message]) -> Encoded:
        """A whole conversation for training, and which of its tokens are answers.

        An answer is what the template writes behind the beginning that it gives an answer, up to
        the last end-of-text token; no token crosses from a beginning into an answer, as none does
        in generation.

        Raises:
            ValueError: as ``encode``; a template that rewrites earlier messages, or that does not
                end answers with the end-of-text token.
        """
        mark = _unused_mark(messages)
        shielded = [self._shielded(message, mark) for message in messages]
        text = self.render(shielded, add_generation_prompt=False)
        ids: list[int] = []
        answers: list[bool] = []
        at = 0
        for index, message in enumerate(shielded):
            if message.get("role") != "assistant":
                continue
            before = self.render(shielded[:index])
            through = self.render(shielded[: index + 1], add_generation_prompt=False)
            if not (text.startswith(through) and through.startswith(before)):
                if not through.startswith(before):
                    self._refuse_asking(shielded[:index], through)
                raise ValueError(
                    f"{self._name} writes messages[{index}] otherwise once others follow; expected "
                    "one that only adds text; take another for training"
                )
            prompt = self._ids(text[at : len(before)], mark, inside=self._is_text(ids))
            answer = self._ids(text[len(before) : len(through)], mark, inside=True)
            told = self._told(answer)
            ids += prompt + answer
            answers += [False] * len(prompt) + [True] * told + [False] * (len(answer) - told)
            at = len(through)
        rest = self._ids(text[at:], mark, inside=self._is_text(ids))
        return Encoded(ids + rest, answers + [False] * len(rest))

    def _refuse_asking(self, asked: list[dict[str, Any]], through: str) -> None:
        """Raise ValueError where only what add_generation_prompt writes is not in the answer."""
        if through.startswith(self.render(asked, add_generation_prompt=False)):
            raise ValueError(
                f"{self._name} begins messages[{len(asked)}] otherwise than the answer that it asks "
                "for; expected add_generation_prompt to write what answers begin with; take "
                "another for training"
            )

    def _told(self, answer: list[int]) -> int:
        """How many of an answer's ids there are up to its end-of-text token."""
        eos = self._tokenizer.eos_id
        if eos is None or eos not in answer:
            raise ValueError(
                f"{self._name} ends an answer without the end-of-text token; expected it, or the "
                "model never learns to stop; add {{ eos_token }} behind the content"
            )
        return len(answer) - answer[::-1].index(eos)

    def _is_text(self, ids: Sequence[int]) -> bool:
        """Whether text stands right before, so that what follows begins no text."""
        return bool(ids) and ids[-1] not in self._specials.values()

    def _shielded(self, message: Message, mark: str) -> dict[str, Any]:
        """The message with the names of tokens broken by a mark, which ``_ids`` takes out."""
        content = message.get("content")
        if not isinstance(content, str):
            return dict(message)
        broken = self._guarded.sub(lambda found: f"{found[0][:1]}{mark}{found[0][1:]}", content)
        return {**message, "content": broken}

    def _ids(self, text: str, mark: str, *, inside: bool = False) -> list[int]:
        ids, at = list[int](), 0
        for found in self._pattern.finditer(text):
            ids += self._plain(text[at : found.start()], mark, inside=inside and not at)
            ids.append(self._specials[found[0]])
            at = found.end()
        return ids + self._plain(text[at:], mark, inside=inside and not at)

    def _plain(self, text: str, mark: str, *, inside: bool) -> list[int]:
        encode = self._tokenizer.encode_inside if inside else self._tokenizer.encode
        whole = text.replace(mark, "")
        if not any(marker in whole for marker in self._tokenizer.markers):
            return encode(whole)
        # The tokenizer would find a marker that was broken, were its parts put together again.
        first, *others = text.split(mark)
        return encode(first) + [i for part in others for i in self._tokenizer.encode_inside(part)]


def template_for(tokenizer: Tokenizer, default: str) -> ChatTemplate:
    """The chat template that a tokenizer brought along, or else one of ``TEMPLATES``.

    Raises:
        ValueError: a template that jinja2 cannot read.
    """
    if tokenizer.chat_template is not None:
        return ChatTemplate(tokenizer.chat_template, tokenizer)
    return ChatTemplate(TEMPLATES[default], tokenizer)


class _Generation(Extension):
    """The block ``generation`` of transformers: what is inside, for ``render`` changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """What finds any of some names, the longest first; nothing where there are none."""
    longest_first = sorted(names, key=lambda name: -len(name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _unused_mark(messages: Sequence[Message]) -> str:
    used = "".join(str(message.get("content")) for message in messages)
    for mark in _MARKS:
        if mark not in used:
            return mark
    raise ValueError(
        "messages hold U+FDD0 to U+FDD3, which are no characters; expected text; remove one of them"
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)
