"""What vocabularies of pieces share: spaces written as U+2581, and bytes as <0xNN>."""

import re
from collections.abc import Callable, Mapping, Sequence

SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_of_piece(piece: str) -> int | None:
    """Return the byte that a piece such as <0x0A> stands for, None for other pieces."""
    match = _BYTE_PIECE.fullmatch(piece)
    return int(match[1], 16) if match else None


def cut_pieces(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[list[int]]],
    byte_ids: Mapping[int, int],
    *,
    escape: bool,
) -> list[list[int]]:
    """Encode texts so that a U+2581 in the text itself is not read as a space.

    Args:
        texts: any texts.
        encode: ids of texts without U+2581 (with escape: of texts whose spaces became U+2581).
        byte_ids: byte to id; the bytes of a literal U+2581 are written with them.
        escape: whether encode expects spaces as U+2581.

    Raises ValueError for a literal U+2581 where byte_ids lacks its bytes.
    """
    spans = [text.split(SPACE) for text in texts]
    flat = [part.replace(" ", SPACE) if escape else part for parts in spans for part in parts]
    encoded = iter(encode(flat))
    if any(len(parts) > 1 for parts in spans) and not set(SPACE.encode()) <= set(byte_ids):
        raise ValueError(
            "text holds U+2581, which this vocabulary reads as a space; expected text without it; "
            "use a tokenizer with byte fallback"
        )
    literal = [byte_ids[value] for value in SPACE.encode()] if byte_ids else []
    results = []
    for parts in spans:
        ids = list(next(encoded))
        for _ in parts[1:]:
            ids += literal
            ids += next(encoded)
        results.append(ids)
    return results
