"""Decoding of a token stream that never shows half a code point."""

import codecs

from transnormer.data.tokenizers.base import Tokenizer


class StreamDecoder:
    """Text of tokens as they arrive: push ids one by one, flush at the end.

    Everything that push and flush return, joined, is what the bytes of all ids decode to. Bytes
    that cannot become UTF-8 show as U+FFFD as soon as that is certain.
    """

    def __init__(self, tokenizer: Tokenizer, *, from_start: bool = False) -> None:
        """Decode tokens of `tokenizer`.

        Args:
            tokenizer: whose ids are pushed.
            from_start: whether the first id begins a document; the tokenizer's prefix is then
                dropped, as decode does. False continues a text, where a leading space counts.
        """
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._prefix = tokenizer.prefix if from_start else b""
        self._held = b""

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is now complete, often the empty string."""
        data = self._tokenizer.token_bytes(token_id)
        if self._prefix:
            self._held += data
            if len(self._held) < len(self._prefix) and self._prefix.startswith(self._held):
                return ""
            data = self._held.removeprefix(self._prefix)
            self._prefix = self._held = b""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return what is left: U+FFFD for a code point that never became complete."""
        held, self._held = self._held, b""
        return self._decoder.decode(held, final=True)
