"""Long texts with something to be found in them, made from word lists: nothing is downloaded.

The same seed gives the same text on every machine. Lengths are in tokens of the tokenizer at hand.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transnormer.data.tokenizers import Tokenizer

# Mohtashami & Jaggi 2023, Landmark Attention (arXiv:2305.16300), the texts of its pass key task.
_PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
_PASSKEY_FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
_PASSKEY = " The pass key is {key}. Remember it. {key} is the pass key."
_PASSKEY_QUESTION = " What is the pass key? The pass key is"
_QUESTION = "What is the special magic number for {place}?"
_NEEDLES = {
    "needle_easy": " Question: " + _QUESTION + " Answer: {key}.",
    "needle_standard": " The special magic number for {place} is {key}.",
}
_NEEDLE_QUESTION = "\n\nQuestion: " + _QUESTION + "\nAnswer:"

_ADJECTIVES = (
    *("old", "quiet", "narrow", "bright", "heavy", "empty", "gentle", "distant"),
    *("careful", "broken", "golden", "plain"),
)
_NOUNS = (
    *("river", "farmer", "window", "letter", "market", "bridge", "doctor", "garden"),
    *("engine", "teacher", "forest", "island", "painter", "kitchen", "lantern", "sailor"),
    *("orchard", "clock", "village", "carpet", "station", "soldier", "library", "fountain"),
)
_VERBS = (
    *("followed", "watched", "carried", "forgot", "described", "repaired", "crossed", "found"),
    *("left", "praised", "sold", "reached"),
)
_TIMES = (
    *("in the morning", "after the storm", "before winter", "without a word", "every summer"),
    *("on the way home", "at the end of the street", "during the long war", "once a week"),
    *("by the light of the moon", "for many years", "against all advice"),
)
_PLACES = (
    *("Lisbon", "Nairobi", "Kyoto", "Bergen", "Quito", "Hanoi", "Dakar", "Riga"),
    *("Lima", "Cork", "Perth", "Oslo", "Turin", "Delhi", "Sofia", "Cairo"),
)


class Haystack(NamedTuple):
    """A text and what is to be found.

    Attributes:
        prompt: the text, which ends with the question.
        answer: what should follow; it does not stand behind the question in the prompt.
        depth: where the needle lies, 0 at the start and 1 at the end.
    """

    prompt: str
    answer: str
    depth: float


def passkeys(tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Haystack]:
    """Texts of at most ``length`` tokens that hide a key of five digits in repeated sentences."""
    return _hidden(tokenizer, "passkey", length, count, seed)


def needles(tokenizer: Tokenizer, name: str, length: int, count: int, seed: int) -> list[Haystack]:
    """Texts of at most ``length`` tokens that hide a number of seven digits in made-up sentences.

    In the easy form the question stands in the text with its answer, and is then repeated; in the
    standard form the text holds the statement alone (the two forms of Shen et al. 2024,
    arXiv:2406.16690, in sentences that need no download).

    Args:
        tokenizer: whose tokens count.
        name: "needle_easy" or "needle_standard".
        length: most tokens of a prompt.
        count: prompts; needle i lies at depth i / (count - 1).
        seed: another seed, other texts.
    """
    return _hidden(tokenizer, name, length, count, seed)


def _hidden(tokenizer: Tokenizer, name: str, length: int, count: int, seed: int) -> list[Haystack]:
    found = []
    for index in range(count):
        rng = random.Random(f"{seed} {name} {length} {index}")
        depth = index / (count - 1) if count > 1 else 0.5
        if name == "passkey":
            key = str(rng.randrange(10_000, 100_000))
            texts = (_PASSKEY_TASK, _PASSKEY.format(key=key), _PASSKEY_QUESTION)
            sentences = _repeated()
        else:
            key, place = str(rng.randrange(1_000_000, 10_000_000)), rng.choice(_PLACES)
            needle = _NEEDLES[name].format(place=place, key=key)
            texts = ("", needle, _NEEDLE_QUESTION.format(place=place))
            sentences = _made_up(rng)
        prompt = _filled(tokenizer, texts, sentences, length, depth)
        found.append(Haystack(prompt, f" {key}", depth))
    return found


def _repeated() -> Iterator[str]:
    while True:
        yield from _PASSKEY_FILLER


def _made_up(rng: random.Random) -> Iterator[str]:
    """Sentences that say nothing; the words are as good as independent."""
    while True:
        adjective, subject, verb = rng.choice(_ADJECTIVES), rng.choice(_NOUNS), rng.choice(_VERBS)
        yield f" The {adjective} {subject} {verb} the {rng.choice(_NOUNS)} {rng.choice(_TIMES)}."


def _filled(
    tokenizer: Tokenizer,
    texts: tuple[str, str, str],
    sentences: Iterator[str],
    length: int,
    depth: float,
) -> str:
    """Beginning, sentences with the needle among them, and question, in at most ``length`` tokens."""
    begin, needle, question = texts
    room = length - sum(map(len, tokenizer.encode_batch(texts)))
    filler: list[str] = []
    while room > 0:
        # By the thousand: a text of 128k tokens has some ten thousand sentences.
        batch = [next(sentences) for _ in range(min(1000, room // 4 + 1))]
        filler += batch
        room -= sum(map(len, tokenizer.encode_batch(batch)))
    while True:
        cut = round(depth * len(filler))
        prompt = begin + "".join([*filler[:cut], needle, *filler[cut:]]) + question
        excess = len(tokenizer.encode(prompt)) - length
        if excess <= 0:
            return prompt
        if not filler:
            raise ValueError(
                f"length is {length}; expected at least {length + excess} tokens of this "
                "tokenizer, so that the question and what it asks for have room"
            )
        per_sentence = _tokens_of(tokenizer, filler[-32:])
        del filler[-max(1, excess // per_sentence) :]


def _tokens_of(tokenizer: Tokenizer, sentences: Sequence[str]) -> int:
    """Tokens of the longest of some sentences, at least 1."""
    return max(1, *map(len, tokenizer.encode_batch(sentences)))
