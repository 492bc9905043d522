"""Greedy answers to held-out instructions: do they end, and do they have the form of the set?

Reads lines of make_instructions.py and prints a table, some answers, and one JSON object last.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from transnormer import generate, load
from transnormer.data.chat_template import template_for
from transnormer.data.conversations import Example, read_examples
from transnormer.data.tokenizers import load_tokenizer
from transnormer.models.checkpoint import find_tokenizer

_ASKED = re.compile(r'Define the (?P<part>\w+) "(?P<word>.+)"\.')


def has_form(question: str, answer: str) -> bool:
    """Whether a definition is one line "... (part): ..." with the part of speech that was asked for.

    Of other answers: one line that begins with a capital and ends a sentence.
    """
    asked = _ASKED.fullmatch(question)
    if asked is None:
        return answer[:1].isupper() and answer[-1:] in (".", "!", "?") and "\n" not in answer
    return re.fullmatch(rf"[^\n:]+ \({asked['part']}\): [^\n]+", answer) is not None


def has_word(question: str, answer: str) -> bool:
    """Whether a definition begins with the word that was asked for."""
    asked = _ASKED.fullmatch(question)
    return asked is not None and answer.startswith(f"{asked['word']} (")


def answers(
    checkpoint: str, examples: Sequence[Example], most: int
) -> tuple[list[str], list[str | None]]:
    """What a model says to the first question of each conversation, and how it ended."""
    model, tokenizer = load(checkpoint), load_tokenizer(find_tokenizer(checkpoint) or "")
    template = template_for(tokenizer, "released")
    texts, reasons = list[str](), list[str | None]()
    for start in range(0, len(examples), 32):
        asked = [
            torch.tensor(template.encode([m for m in example.messages if m["role"] == "user"][:1]))
            for example in examples[start : start + 32]
        ]
        said = generate(model, asked, max_new_tokens=most, temperature=0.0)
        for _ in said:
            pass
        texts += [tokenizer.decode(ids) for ids in said.token_ids]
        reasons += said.finish_reasons
    return texts, reasons


def measure(checkpoint: str, examples: Sequence[Example], most: int, shown: int) -> dict[str, Any]:
    """The shares, by kind of question."""
    texts, reasons = answers(checkpoint, examples, most)
    found: dict[str, Any] = {"checkpoint": checkpoint}
    questions = [example.messages[0]["content"] for example in examples]
    for kind, wanted in (("definitions", True), ("manuals", False)):
        rows = [i for i, q in enumerate(questions) if (_ASKED.fullmatch(q) is not None) is wanted]
        if not rows:
            continue
        ended = [i for i in rows if reasons[i] == "stop"]
        counts = {
            "questions": len(rows),
            "ended": len(ended),
            "form": sum(has_form(questions[i], texts[i]) for i in ended),
            "word": sum(has_word(questions[i], texts[i]) for i in ended),
        }
        print(f"{checkpoint}: {kind}: {counts}")
        found[kind] = counts
        for i in rows[:shown]:
            print(f"  {questions[i]}\n    {texts[i][:160]!r}")
    return found


def main() -> None:
    """Measure every checkpoint that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path, help="held-out lines of make_instructions.py")
    parser.add_argument("checkpoints", nargs="+", help="runs, steps or saved models")
    parser.add_argument("--questions", type=int, default=100, help="of each kind, at most")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--show", type=int, default=2, help="answers of each kind to print")
    given = parser.parse_args()
    examples = [example for example in read_examples(str(given.lines)) if example.messages]
    kinds: dict[bool, list[Example]] = {True: [], False: []}
    for example in examples:
        kinds[_ASKED.fullmatch(example.messages[0]["content"]) is not None].append(example)
    some = [example for kind in kinds.values() for example in kind[: given.questions]]
    found = [
        measure(checkpoint, some, given.max_new_tokens, given.show)
        for checkpoint in given.checkpoints
    ]
    print(json.dumps({"measured": found}))


if __name__ == "__main__":
    main()
