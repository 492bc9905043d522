"""Instructions and conversations: reading JSON lines, and their tokens with the answers marked."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transnormer.data.chat_template import ChatTemplate, Encoded, Message
from transnormer.data.documents import find_files, read_records
from transnormer.data.tokenizers.base import Tokenizer, start_id

ROLES = ("system", "user", "assistant")
# For each kind of line the fields that it must have; the first kind that fits is taken.
_KINDS = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
}
_EXPECTED = "messages, or prompt and completion, or instruction, (input,) output"


class Example(NamedTuple):
    """One line of a file.

    Attributes:
        name: file:line.
        messages: a conversation that ends with an answer; empty where the line is plain text.
        text: (prompt, completion) that no template touches; None for conversations.
        group: lines of one group are never on both sides of a split.
    """

    name: str
    messages: tuple[Message, ...]
    text: tuple[str, str] | None
    group: str


def read_examples(
    pattern: str, *, name: str = "data.path", without: Collection[Path] = ()
) -> Iterator[Example]:
    """Yield the lines of files of JSON lines, plain or as .xz, .gz or .zst.

    Three kinds of lines, which a file may mix:

    - ``{"messages": [{"role": ..., "content": ...}, ...]}``: an optional system message, then user
      and assistant in turn, the assistant last;
    - ``{"instruction": ..., "input": ..., "output": ...}``: with an input that is not empty the
      instruction is the system message and the input the user's, else the instruction is the
      user's, as the released fine-tuning script has them;
    - ``{"prompt": ..., "completion": ...}``: two texts, which are read one after the other without
      a template, or two lists of messages, which make one conversation.

    ``group``, a string or an integer, may stand in any line; other fields are ignored.

    Args:
        pattern: a file, a directory or a glob; of the last two only .jsonl files are read.
        name: what messages call the pattern.
        without: files to leave out, as resolved paths.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: a line that is none of these (file and line are named), no line at all.
    """
    empty = True
    for path in find_files(pattern, name=name):
        if path.resolve() in without or ".jsonl" not in [s.lower() for s in path.suffixes]:
            continue
        for where, record in read_records(path):
            empty = False
            yield _read_line(where, record)
    if empty:
        what = "no line of JSON beside the held-out ones" if without else "no line of JSON"
        raise ValueError(f"{name} is {pattern!r}, which holds {what}; expected .jsonl files")


def _read_line(where: str, record: Any) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no object; expected one with {_EXPECTED}")
    kinds = [kind for kind, fields in _KINDS.items() if all(x in record for x in fields)]
    if len(kinds) != 1:
        found = " beside ".join(kinds) or f"the fields {', '.join(sorted(record)) or 'none'}"
        raise ValueError(f"{where} has {found}; expected one of {_EXPECTED}")
    group = record.get("group")
    if not (group is None or (isinstance(group, str | int) and not isinstance(group, bool))):
        raise ValueError(f"{where}: group is {group!r}; expected a string or an integer")
    messages, text = _content(where, record)
    if group is None:
        group = json.dumps([list(map(dict, messages)), text], sort_keys=True)
    return Example(where, messages, text, str(group))


def _content(
    where: str, record: Mapping[str, Any]
) -> tuple[tuple[Message, ...], tuple[str, str] | None]:
    if "messages" in record:
        return check_messages(record["messages"], name=f"{where}: messages"), None
    if "instruction" in record:
        instruction = _text(where, "instruction", record["instruction"])
        given = _text(where, "input", record.get("input", ""), may_be_empty=True)
        asked = [("system", instruction), ("user", given)] if given else [("user", instruction)]
        said = [*asked, ("assistant", _text(where, "output", record["output"]))]
        return tuple({"role": role, "content": content} for role, content in said), None
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return check_messages([*prompt, *completion], name=f"{where}: prompt + completion"), None
    return (), (_text(where, "prompt", prompt), _text(where, "completion", completion))


def check_messages(messages: Any, *, name: str, answered: bool = True) -> tuple[Message, ...]:
    """Return role and content of the messages of a conversation.

    Args:
        messages: a list of objects with ``role`` and ``content``; other fields are left out.
        name: what error messages call it.
        answered: whether the last message is an answer, or a question.

    Raises:
        ValueError: anything but an optional system message and then user and assistant in turn,
            with texts that are not empty; the message is named.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{name} is {messages!r}; expected a list of messages")
    found: list[Message] = []
    for index, message in enumerate(messages):
        where = f"{name}[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {message!r}; expected an object with role and content")
        role = message.get("role")
        first = index == 0 or (index == 1 and found[0]["role"] == "system")
        after = "user" if first or found[-1]["role"] == "assistant" else "assistant"
        if role != after and not (index == 0 and role == "system"):
            known = "" if role in ROLES else f", of the roles {', '.join(ROLES)}"
            system = "'system' or " if index == 0 else ""
            raise ValueError(f"{where}.role is {role!r}; expected {system}{after!r}{known}")
        content = _text(where, "content", message.get("content"))
        found.append({"role": role, "content": content})
    last = "assistant" if answered else "user"
    if found[-1]["role"] != last:
        raise ValueError(f"{name} ends with {found[-1]['role']!r}; expected {last!r}, the last")
    return tuple(found)


def _text(where: str, field: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or may_be_empty):
        what = "a text, or none of the field" if may_be_empty else "a text that is not empty"
        raise ValueError(f"{where}: {field} is {value!r}; expected {what}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(
            f"{where}: {field} holds a lone surrogate; expected text that UTF-8 can hold; remove it"
        )
    return value


def encode_example(example: Example, template: ChatTemplate, tokenizer: Tokenizer) -> Encoded:
    """The tokens of a line, the start token first, and which of them are answers.

    Raises:
        ValueError: the line is named, with what the template or the tokenizer refuses.
    """
    try:
        if example.text is None:
            return template.encode_answers(example.messages)
        eos = tokenizer.eos_id
        if eos is None:
            raise ValueError("the tokenizer has no end-of-text token; expected one")
        prompt = [start_id(tokenizer), *tokenizer.encode(example.text[0])]
        completion = [*tokenizer.encode_inside(example.text[1]), eos]
    except ValueError as error:
        raise ValueError(f"{example.name}: {error}") from error
    return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))
