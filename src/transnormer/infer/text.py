"""Where text and token ids meet: how a text begins, and text as it is generated."""

from collections.abc import Iterator, Sequence

from transnormer.data.tokenizers import StreamDecoder, Tokenizer, start_id
from transnormer.infer.generate import FINISHED, Generation
from transnormer.models.decoder import Decoder


def begin_id(model: Decoder, tokenizer: Tokenizer) -> int:
    """The token that a text begins with: the model's own, or else the tokenizer's."""
    bos = model.config.bos_token_id
    return start_id(tokenizer) if bos is None else bos


class StopText:
    """The text of tokens as they come, up to the first of some stop strings.

    A piece never ends within a code point, and text that may be the beginning of a stop string is
    held back until that is decided. Called with the ids so far it is an ``until`` of
    ``Engine.submit``; ``pieces`` then holds what it gave.

    Args:
        tokenizer: what the ids mean.
        stop: strings that end the text and do not belong to it.
        from_start: whether the first token begins a document, see ``StreamDecoder``.

    Attributes:
        stopped: a stop string has come; later tokens are not looked at.
        pieces: of the calls with ids so far; joined and with ``finish`` they are the text.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, from_start: bool = False
    ) -> None:
        for text in stop:
            if not text:
                raise ValueError("stop holds an empty string; expected at least one character")
        self.stopped = False
        self.pieces: list[str] = []
        self._stop = tuple(stop)
        self._decoder = StreamDecoder(tokenizer, from_start=from_start)
        self._held = ""

    def __call__(self, ids: Sequence[int]) -> bool:
        """Take the last of the ids; returns whether the text ends here."""
        piece = self.push(ids[-1])
        if piece:
            self.pieces.append(piece)
        return self.stopped

    def push(self, token: int) -> str:
        """The text that a token makes certain, which may be empty."""
        return "" if self.stopped else self._take(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back, after the last token; empty where a stop string has come."""
        piece = "" if self.stopped else self._take(self._decoder.flush())
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _take(self, text: str) -> str:
        """Add text and return what is certain to belong to the result."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
            return piece
        undecided = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - undecided
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece


class TextStream:
    """The text of one row of a generation, piece by piece; joined, the pieces are the text.

    Pieces and stop strings are those of ``StopText``.

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
            stop, from_start: as ``StopText``'s.

        Raises:
            ValueError: an empty stop string.
        """
        self._text = StopText(tokenizer, stop, from_start=from_start)
        generation.draw_below(tokenizer.vocab_size)
        self.finish_reason: str | None = None
        self._generation, self._row = generation, row

    def __iter__(self) -> Iterator[str]:
        for tokens in self._generation:
            token = int(tokens[self._row])
            if token == FINISHED:
                break
            piece = self._text.push(token)
            if self._text.stopped:
                self.finish_reason = "stop"
            if piece:
                yield piece
            if self.finish_reason is not None:
                return
            if self._generation.finish_reasons[self._row] is not None:
                break
        piece = self._text.finish()
        reason = self._generation.finish_reasons[self._row]
        self.finish_reason = "stop" if self._text.stopped else reason
        if piece:
            yield piece


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
