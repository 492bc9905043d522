"""Lines of instructions: the kinds that are read, and what is said of wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from transnormer.data.chat_template import TEMPLATES, ChatTemplate
from transnormer.data.conversations import encode_example, read_examples
from transnormer.data.tokenizers import ByteTokenizer

TURNS = [("user", "a?"), ("assistant", "b."), ("user", "c?"), ("assistant", "d.")]


def messages(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Messages of roles and contents."""
    return [{"role": role, "content": content} for role, content in turns]


def written(path: Path, *rows: Any) -> str:
    """A file of JSON lines; a str is a line as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_every_kind_of_line_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl",
        {"messages": messages(("system", "s"), *TURNS), "source": "ignored"},
        {"instruction": "a?", "output": "b."},
        {"instruction": "be short", "input": "a?", "output": "b."},
        {"instruction": "a?", "input": "", "output": "b.", "group": 7},
        {"prompt": messages(*TURNS[:3]), "completion": messages(*TURNS[3:])},
        {"prompt": "a", "completion": "b", "group": "g"},
    )
    found = list(read_examples(path))
    pair = tuple(messages(*TURNS[:2]))
    assert [example.messages for example in found] == [
        tuple(messages(("system", "s"), *TURNS)),
        pair,
        (messages(("system", "be short"))[0], *pair),
        pair,
        tuple(messages(*TURNS)),
        (),
    ]
    assert [example.text for example in found] == [None] * 5 + [("a", "b")]
    assert [example.name for example in found] == [f"{path}:{line}" for line in range(1, 7)]
    assert (found[3].group, found[5].group) == ("7", "g")
    assert len({example.group for example in found}) == 6


WRONG = {
    "no-object": ([1], "is no object; expected one with messages"),
    "no-json": ('{"messages": ', "is not JSON"),
    "no-kind": ({"text": "x"}, "has the fields text; expected one of messages"),
    "two-kinds": (
        {"prompt": "a", "completion": "b", "messages": messages(*TURNS)},
        "has messages beside prompt and completion; expected one of",
    ),
    "empty-list": ({"messages": []}, r"messages is \[\]; expected a list of messages"),
    "no-list": ({"messages": "a"}, "messages is 'a'; expected a list"),
    "no-message": ({"messages": ["a"]}, r"messages\[0\] is 'a'; expected an object with role"),
    "role": (
        {"messages": messages(("human", "a"), TURNS[1])},
        r"messages\[0\].role is 'human'; expected 'system' or 'user', of the roles system, user",
    ),
    "twice": (
        {"messages": messages(TURNS[0], TURNS[0])},
        r"messages\[1\].role is 'user'; expected 'assistant'",
    ),
    "late-system": (
        {"messages": messages(*TURNS[:2], ("system", "s"))},
        r"messages\[2\].role is 'system'; expected 'user'",
    ),
    "no-answer": ({"messages": messages(*TURNS[:3])}, "messages ends with 'user'; expected 'assi"),
    "system-alone": ({"messages": messages(("system", "s"))}, "ends with 'system'"),
    "no-content": (
        {"messages": [{"role": "user"}]},
        r"messages\[0\]: content is None; expected a text that is not empty",
    ),
    "empty-content": (
        {"messages": messages(TURNS[0], ("assistant", ""))},
        r"messages\[1\]: content is ''",
    ),
    "surrogate": ({"instruction": "\ud800", "output": "b"}, "instruction holds a lone surrogate"),
    "input": ({"instruction": "a", "input": 3, "output": "b"}, "input is 3; expected a text, or"),
    "mixed-prompt": ({"prompt": "a", "completion": messages(TURNS[1])}, "completion is .*expected"),
    "empty-prompt": ({"prompt": "", "completion": "b"}, "prompt is ''; expected a text"),
    "group": ({"prompt": "a", "completion": "b", "group": True}, "group is True; expected a str"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_line_is_named_by_file_and_number(tmp_path: Path, name: str) -> None:
    row, message = WRONG[name]
    path = written(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"}, row)
    with pytest.raises(ValueError, match=rf"a\.jsonl:2.*{message}"):
        list(read_examples(path))


def test_no_line_at_all_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", "")
    with pytest.raises(ValueError, match=r"holds no line of JSON; expected .jsonl files"):
        list(read_examples(path))
    other = written(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    without = {Path(other).resolve()}
    with pytest.raises(ValueError, match="no line of JSON beside the held-out ones"):
        list(read_examples(str(tmp_path / "b.jsonl"), without=without))


def test_a_prompt_and_its_completion_need_no_template(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    template = ChatTemplate(TEMPLATES["released"], tokenizer)
    path = written(tmp_path / "a.jsonl", {"prompt": "ab</s>", "completion": "cd"})
    ids, answers = encode_example(next(read_examples(path)), template, tokenizer)
    assert ids == [tokenizer.bos_id, *b"ab</s>cd", tokenizer.eos_id]
    assert answers == [False] * 7 + [True] * 3


def test_what_a_template_refuses_names_the_line(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    template = ChatTemplate("{{ raise_exception('no') }}", tokenizer)
    path = written(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1: messages do not fit the chat template: no"):
        encode_example(next(read_examples(path)), template, tokenizer)
