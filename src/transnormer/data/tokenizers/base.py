"""What every tokenizer offers, and the byte table that all of them decode with.

One rule holds for every kind: decode(encode(text)) is text, for any text that UTF-8 can hold. A
tokenizer file whose normaliser would rewrite the text (NFC, runs of spaces, case) is used without
that normaliser. Ids of text that the normaliser leaves alone are the same as without this rule.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from transnormer.files import write_atomic

CHAT_TEMPLATE = "chat_template.jinja"


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are 0 .. vocab_size - 1.
        bos_id, eos_id, pad_id: special ids, None where the vocabulary has none.
        fingerprint: sha256 of the tokenizer's canonical bytes, 64 hex digits.
        prefix: bytes that encode puts before any text and decode takes away again (the space that
            SentencePiece calls dummy prefix); they count neither as text nor as scored bytes.
        special_tokens: names of the tokens that stand for no text, and their ids.
        markers: names of tokens that ``encode`` finds in a text, though no merge leads to them.
        chat_template: how a conversation is written, in Jinja (see ``data.chat``); None where
            nothing says. It is kept beside the tokenizer and is no part of the fingerprint.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str
    prefix: bytes
    special_tokens: Mapping[str, int]
    markers: frozenset[str]
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; no special token is added or recognised in the text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return encode(text) of every text."""
        ...

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of a text that stands behind other text, so without the prefix."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; specials vanish, bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, b"" for special tokens and unused ids."""
        ...

    def save(self, directory: Path) -> None:
        """Write the files that load_tokenizer(directory) reads."""
        ...


class TableTokenizer(ABC):
    """A tokenizer whose ids stand for fixed byte strings; subclasses say how text is cut.

    Every encoding is checked against the table: ids that would decode to another text raise.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    prefix: bytes = b""
    special_tokens: Mapping[str, int] = {}
    markers: frozenset[str] = frozenset()
    chat_template: str | None = None

    def __init__(self, table: Sequence[bytes], fingerprint: str, name: str) -> None:
        """Keep the byte string of every id, the fingerprint, and a name for messages."""
        self._table = list(table)
        self.vocab_size = len(self._table)
        self.fingerprint = fingerprint
        self.name = name

    @abstractmethod
    def _cut(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, which begins with the prefix; texts are not empty."""

    @abstractmethod
    def _write(self, directory: Path) -> None:
        """Write the vocabulary's files."""

    def save(self, directory: Path) -> None:
        """Write the files that load_tokenizer(directory) reads, the chat template among them."""
        self._write(Path(directory))
        if self.chat_template is not None:
            write_atomic(Path(directory) / CHAT_TEMPLATE, self.chat_template.encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises ValueError for a text that UTF-8 cannot hold (a lone surrogate) and for one that this
        vocabulary cannot express exactly; TypeError for what is not a text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return encode(text) of every text."""
        if isinstance(texts, str):
            raise TypeError("texts is a str; expected a sequence of str; use encode for one text")
        return self._encode(texts, self.prefix)

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of a text that stands behind other text, so without the prefix."""
        return self._encode([text], b"")[0]

    def _encode(self, texts: Sequence[str], prefix: bytes) -> list[list[int]]:
        encoded = [_utf8(text) for text in texts]
        filled = [prefix.decode() + text for text in texts if text]
        cut = iter(self._cut(filled) if filled else [])
        results = [next(cut) if text else [] for text in texts]
        for ids, data in zip(results, encoded, strict=True):
            if data and b"".join([self._table[i] for i in ids]) != prefix + data:
                self._refuse(ids, data)
        return results

    def _refuse(self, ids: Sequence[int], data: bytes) -> None:
        shared = 0
        result = b"".join([self._table[i] for i in ids]).removeprefix(self.prefix)
        while shared < min(len(result), len(data)) and result[shared] == data[shared]:
            shared += 1
        around = data[max(0, shared - 8) : shared + 8]
        raise ValueError(
            f"tokenizer {self.name} cannot express the text near byte {shared} ({around!r}); "
            "expected a vocabulary that covers every byte; use one with byte fallback"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; ValueError for an id outside the vocabulary."""
        data = b"".join([self.token_bytes(i) for i in ids]).removeprefix(self.prefix)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, b"" for special tokens and unused ids."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id is {token_id}; expected 0 to {self.vocab_size - 1}; the model and the "
                f"tokenizer {self.name} may not belong together"
            )
        return self._table[token_id]


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of bytes of every token, int64 [vocab_size]; 0 for special tokens.

    token_lengths(t)[ids].sum() is the UTF-8 length of the text that ids stand for, plus the
    tokenizer's prefix where ids begin a document.
    """
    lengths = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    return np.array(lengths, dtype=np.int64)


def start_id(tokenizer: Tokenizer) -> int:
    """Return the id that stands before the first token of a document: bos, else eos.

    The loader puts it there, so a model that was trained here has seen it; scoring and generation
    must begin with the same id.
    """
    for candidate in (tokenizer.bos_id, tokenizer.eos_id):
        if candidate is not None:
            return candidate
    raise ValueError("tokenizer has neither bos nor eos; expected one; add one to its file")


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}; expected str; decode bytes first")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at {error.start}; "
            "expected text that UTF-8 can hold; remove it"
        ) from None
