"""Where text and token ids meet: how a text begins, and text as it is generated."""

from collections.abc import Iterator, Sequence

from transnormer.data.tokenizers import StreamDecoder, Tokenizer, start_id
from transnormer.infer.generate import FINISHED, Generation
from transnormer.models.decoder import Decoder


def begin_id(model: Decoder, tokenizer: Tokenizer) -> int:
    """The token that a text begins with: the model's own, or else the tokenizer's."""
    bos = model.config.bos_token_id
    return start_id(tokenizer) if bos is None else bos


class TextStream:
    """The text of one row of a generation, piece by piece; joined, the pieces are the text.

    A piece never ends within a code point, and text that may be the beginning of a stop string is
    held back until that is decided.

    Attributes:
        finish_reason: "stop" (a stop string, or the generation's own stop), "length", or None
            while the stream runs.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        *,
        row: int = 0,
        stop: Sequence[str] = (),
        from_start: bool = False,
    ) -> None:
        """Stream a row.

        Args:
            generation: the tokens; iterating this object draws them, from now on only such as the
                tokenizer has.
            tokenizer: what their ids mean.
            row: of the batch.
            stop: strings that end the text and do not belong to it.
            from_start: whether the first token begins a document, see ``StreamDecoder``.

        Raises:
            ValueError: an empty stop string.
        """
        for text in stop:
            if not text:
                raise ValueError("stop holds an empty string; expected at least one character")
        generation.draw_below(tokenizer.vocab_size)
        self.finish_reason: str | None = None
        self._generation, self._row, self._stop = generation, row, tuple(stop)
        self._decoder = StreamDecoder(tokenizer, from_start=from_start)
        self._held = ""

    def __iter__(self) -> Iterator[str]:
        for tokens in self._generation:
            token = int(tokens[self._row])
            if token == FINISHED:
                break
            piece = self._take(self._decoder.push(token))
            if piece:
                yield piece
            if self.finish_reason is not None:
                return
            if self._generation.finish_reasons[self._row] is not None:
                break
        piece = self._take(self._decoder.flush())
        if self.finish_reason is None:
            piece, self._held = piece + self._held, ""
            self.finish_reason = self._generation.finish_reasons[self._row]
        if piece:
            yield piece

    def _take(self, text: str) -> str:
        """Add text and return what is certain to belong to the result."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.finish_reason = "stop"
            piece, self._held = self._held[: min(found)], ""
            return piece
        undecided = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - undecided
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop, but not all of it."""
    return next(
        (
            size
            for size in range(min(len(text), len(stop) - 1), 0, -1)
            if stop.startswith(text[-size:])
        ),
        0,
    )
