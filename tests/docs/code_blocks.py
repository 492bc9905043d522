"""Finds the code blocks of Markdown and runs them, in the order in which a reader meets them."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transnormer.cli.app import run

_FENCE = re.compile(
    r"(?:^<!-- not run: (.+?) -->\n+)?^( *)```(\w*)[^\n]*\n(.*?)^\2```$", re.M | re.S
)
# Blocks that are no code: output, formulas, plain text.
TEXT = ("", "text", "math", "console")
# Commands that the blocks' own run cannot contain, and why.
NOT_RUN = {
    "make": "it runs this very suite, or trains for minutes",
    "pip": "it would change the environment of the tests",
    "torchrun": "tests/parallel start it",
    "python": "benchmarks and scripts, which have tests or measurements of their own",
    "lm_eval": "another package's command",
    "vllm": "another package's command",
    "curl": "it needs a server; tests/serve start one",
    "chat": "it waits for a keyboard; tests/test_cli.py types",
    "serve": "it ends when it is told to; tests/serve start one",
}
# What a block of Python may hold that cannot be had here.
NEEDS = {
    'device="cuda"': "a GPU",
    "apply_sequence_parallel(": "several processes; tests/parallel start them",
    "from openai import": "a server; tests/serve start one",
    "client.chat.": "a server; tests/serve start one",
    "from vllm import": "vLLM; tests/integrations run it",
}


class Block(NamedTuple):
    """A code block: its language, its lines, and why it is not run, None where it is."""

    line: int
    language: str
    text: str
    not_run: str | None


def blocks_of(document: Path) -> list[Block]:
    """The code blocks of a document, without output and formulas."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        reason, indent, language, body = match.groups()
        if language not in TEXT:
            line = text.count("\n", 0, match.start(3)) + 1
            body = re.sub(rf"^{indent}", "", body, flags=re.M)
            found.append(Block(line, language, body, reason))
    return found


def commands_of(block: Block) -> Iterator[list[str]]:
    """The command lines of a shell block, continued lines joined, comments left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        # Settings of the environment before the command.
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield [re.sub(r"^python[\d.]*$", "python", Path(words[0]).name), *words[1:]]


def reason_not_run(words: list[str]) -> str | None:
    """Why a command line is not run; None where it is one of this package's that ends by itself."""
    name = words[1] if words[0] == "transnormer" and len(words) > 1 else words[0]
    return NOT_RUN.get(name)


def starts_processes(words: list[str]) -> bool:
    """Whether a command line starts processes that share its work, which takes long."""
    return "--ranks" in words


def reason_of(block: Block) -> str | None:
    """Why a block is not run: it says so, or it is Python that needs what is not here."""
    if block.not_run is not None or block.language != "python":
        return block.not_run
    return next((f"needs {what}" for part, what in NEEDS.items() if part in block.text), None)


class Reader:
    """Runs blocks one after the other; those of Python share their names, as in a session.

    Without ``processes`` commands that start some are not run.
    """

    def __init__(self, document: str, names: dict[str, object], processes: bool = True) -> None:
        self.document, self.names, self.processes = document, names, processes
        self.done: list[str] = []
        self.left: list[str] = []

    def read(self, block: Block) -> None:
        """Run a block, or note why it is not run."""
        where = f"{self.document}:{block.line}"
        reason = reason_of(block)
        if reason is not None:
            self.left.append(f"{where} {reason}")
        elif block.language == "python":
            code = compile("\n" * block.line + block.text, self.document, "exec")
            exec(code, self.names)
            self.done.append(where)
        elif block.language in ("sh", "bash", "shell"):
            for words in commands_of(block):
                self._command(where, words)
        elif block.language == "toml":
            tomllib.loads(block.text)
            self.done.append(where)
        elif block.language in ("json", "jsonl"):
            for text in [block.text] if block.language == "json" else block.text.splitlines():
                json.loads(text)
            self.done.append(where)
        else:
            raise AssertionError(
                f"{where} is a block in {block.language!r}; expected python, sh, toml, json or text, "
                "or a line <!-- not run: the reason --> before it"
            )

    def _command(self, where: str, words: list[str]) -> None:
        reason = reason_not_run(words)
        if reason is None and not self.processes and starts_processes(words):
            reason = "it starts processes, as the slow tests let it"
        if reason is not None:
            self.left.append(f"{where} {shlex.join(words)}: {reason}")
            return
        assert words[0] == "transnormer", (
            f"{where}: {shlex.join(words)} is no command that is known"
        )
        assert run(words[1:]) == 0, f"{where}: {shlex.join(words)} failed"
        self.done.append(where)
