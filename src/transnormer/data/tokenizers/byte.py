"""The tokenizer that needs no training: one token a byte."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transnormer.data.tokenizers.base import TableTokenizer
from transnormer.files import write_atomic

FILE_NAME = "byte_tokenizer.json"
_SPECIALS = {"<pad>": 256, "<s>": 257, "</s>": 258}


class ByteTokenizer(TableTokenizer):
    """UTF-8 bytes as ids 0 to 255, then <pad> 256, <s> 257, </s> 258: vocab_size is 259."""

    pad_id, bos_id, eos_id = _SPECIALS.values()
    special_tokens = _SPECIALS

    def __init__(self) -> None:
        """Build the tokenizer; there is only one."""
        table = [bytes([value]) for value in range(256)] + [b""] * len(_SPECIALS)
        super().__init__(table, hashlib.sha256(_canonical()).hexdigest(), "bytes")

    def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def _write(self, directory: Path) -> None:
        write_atomic(directory / FILE_NAME, _canonical())

    @classmethod
    def from_file(cls, path: Path) -> "ByteTokenizer":
        """Read byte_tokenizer.json; it says no more than that ids are bytes."""
        if path.read_bytes() != _canonical():
            raise ValueError(
                f"{path} is not the byte tokenizer's file; expected {_canonical().decode()!r}"
            )
        return cls()


def _canonical() -> bytes:
    content: dict[str, Any] = {"kind": "bytes", "special_tokens": _SPECIALS}
    return json.dumps(content, sort_keys=True).encode()
