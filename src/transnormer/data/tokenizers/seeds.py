"""Characters that a byte-level BPE holds as one token each, whatever its training text holds.

TransNormerLLM's tokenizer has common and rare Chinese characters added to its vocabulary, and UTF-8
bytes for the rest (Qin et al. 2023, arXiv:2307.14995, appendix). Here the training sees such a
character as one symbol beside the 256 bytes, so that words are learned from whole characters; then
merges that build each character from its bytes are put before the learned ones. They cannot get in
each other's way: all begin with a character's first byte.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# Chinese characters of GB 2312: level 1 in order of pronunciation, level 2 by radical.
HAN_COUNTS = (3755, 6763)
_LOWEST = 0x200
_REMEMBERED = 1 << 20
_FIRST_ROW, _LAST_ROWS = 0xB0, (0xD7, 0xF7)


def common_han(count: int) -> str:
    """The characters of GB 2312: its first level (3,755) or both (6,763).

    Raises ValueError for another count.
    """
    if count not in HAN_COUNTS:
        raise ValueError(f"han is {count}; expected {HAN_COUNTS[0]} or {HAN_COUNTS[1]}")
    last = _LAST_ROWS[HAN_COUNTS.index(count)]
    codes = (
        bytes([row, cell]) for row in range(_FIRST_ROW, last + 1) for cell in range(0xA1, 0xFF)
    )
    # The last row of level 1 is not full.
    return "".join(code.decode("gb2312", "ignore") for code in codes)


def first_bytes(characters: str) -> set[bytes]:
    """What the characters are built through: their bytes but the last, from two on.

    Raises ValueError for a character below U+0200, which the byte alphabet may use for a byte.
    """
    for char in characters:
        if ord(char) < _LOWEST:
            raise ValueError(
                f"characters holds {char!r}; expected ones from U+{_LOWEST:04X}; leave it out"
            )
    codes = [char.encode("utf-8") for char in characters]
    return {code[:end] for code in codes for end in range(2, len(code))}


def as_symbols(
    texts: Iterable[str],
    cut: Callable[[str], Iterable[str]],
    alphabet: Mapping[int, str],
    kept: str,
) -> Iterator[str]:
    """Texts as the trainer is to see them: words between spaces, kept characters as they are, all
    others as their bytes.

    Args:
        texts: training texts.
        cut: a text into words.
        alphabet: the printable character of each byte; none is a space.
        kept: characters that are symbols of their own.
    """
    symbols: dict[str, str] = {char: char for char in kept}
    words: dict[str, str] = {}

    def spell(word: str) -> str:
        found = words.get(word)
        if found is None:
            for char in set(word) - symbols.keys():
                symbols[char] = "".join(alphabet[value] for value in char.encode("utf-8"))
            found = "".join(map(symbols.__getitem__, word))
            if len(words) < _REMEMBERED:
                words[word] = found
        return found

    for text in texts:
        yield " ".join(map(spell, cut(text)))


def seed(
    content: str,
    characters: str,
    vocab_size: int,
    alphabet: Mapping[int, str],
    pre_tokenizer: dict[str, Any],
) -> str:
    """Return a tokenizer.json over bytes from one that was trained on `as_symbols`.

    Args:
        content: the trained file; its vocabulary is specials, symbols, merges, in this order.
        characters: its symbols that are no bytes.
        vocab_size: of the result; the last learned merges give way to the characters' first bytes.
        alphabet: the printable character of each byte.
        pre_tokenizer: what cuts words and turns them into bytes, for the file.
    """
    data = json.loads(content)
    model = data["model"]
    spelled = {
        char: "".join(alphabet[value] for value in char.encode("utf-8")) for char in characters
    }

    def spell(token: str) -> str:
        return "".join(spelled.get(char, char) for char in token)

    learned = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merged = {first + second for first, second in learned}
    ordered = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocab = {
        token: place
        for place, token in enumerate(t for t in ordered if t not in merged and t not in spelled)
    }
    merges: list[list[str]] = []
    pairs = [
        (token[:end], token[end]) for token in spelled.values() for end in range(1, len(token))
    ]
    for first, second in [*pairs, *((spell(a), spell(b)) for a, b in learned)]:
        if first + second not in vocab and len(vocab) < vocab_size:
            vocab[first + second] = len(vocab)
            merges.append([first, second])
    model["vocab"], model["merges"] = vocab, merges
    data["pre_tokenizer"] = pre_tokenizer
    return json.dumps(data, ensure_ascii=False)
