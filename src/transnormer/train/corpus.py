"""From data.path to what a run reads: a tokenizer, token shards and held-out texts.

What is made from text is kept in the run directory, so that a resumed run reads the very same
tokens whatever has become of the files at data.path.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from transnormer.data import Corpus as Texts
from transnormer.data import (
    TokenizedCorpus,
    Tokenizer,
    TokenSource,
    load_tokenizer,
    make_tokenizer,
    open_tokenized,
    tokenize_corpus,
)
from transnormer.data.shards import MANIFEST
from transnormer.files import atomic_directory
from transnormer.train.recipe import DataConfig

_TOKENIZER = "tokenizer"
_SAMPLE_BYTES = 2048


class Corpus(NamedTuple):
    """What a run reads.

    Attributes:
        tokenizer: of all sources.
        sources: token shards, each with its weight in the mixture.
        heldout: the texts that are kept out of training; empty where there are none.
    """

    tokenizer: Tokenizer
    sources: tuple[tuple[TokenSource, float], ...]
    heldout: tuple[str, ...]


def open_corpus(config: DataConfig, folder: Path, tell: Callable[[str], None]) -> Corpus:
    """Read the corpus of a run from `folder`, and make it there first where it is not there yet.

    Raises FileNotFoundError and ValueError where data.path, data.tokenizer or data.heldout give
    nothing usable, and ValueError for shards that are damaged or of another tokenizer.
    """
    if not folder.is_dir():
        with atomic_directory(folder) as temporary:
            _prepare(config, temporary, tell)
    tokenizer = load_tokenizer(folder / _TOKENIZER)
    sources, heldout = [], []
    for index, path in enumerate(config.paths):
        source, held = _open_part(path, folder / f"{index:02d}")
        for found in (source, held):
            if found is not None:
                found.check_tokenizer(tokenizer)
        weight = float(len(source)) if config.weights is None else config.weights[index]
        sources.append((source, weight))
        if held is not None and not (index and isinstance(config.heldout, str)):
            heldout += [tokenizer.decode(ids[:-1].tolist()) for _, _, ids in held.documents()]
    return Corpus(tokenizer, tuple(sources), tuple(heldout))


def _open_part(path: str, made: Path) -> tuple[TokenSource, TokenSource | None]:
    if (Path(path) / MANIFEST).is_file():
        return TokenSource(Path(path)), None
    corpus = _tokenized_at(path) or open_tokenized(made)
    return corpus.open("train"), corpus.open("heldout") if corpus.heldout is not None else None


def _tokenized_at(path: str) -> TokenizedCorpus | None:
    """Open a folder that `transnormer tokenize` made; None for anything else."""
    whole = (Path(path) / "train" / MANIFEST).is_file()
    return open_tokenized(Path(path)) if whole else None


def _prepare(config: DataConfig, folder: Path, tell: Callable[[str], None]) -> None:
    texts = {
        index: Texts(path, heldout=config.heldout)
        for index, path in enumerate(config.paths)
        if not (Path(path) / MANIFEST).is_file() and _tokenized_at(path) is None
    }
    for text in texts.values():
        tell(text.summary())
    tokenizer = _tokenizer(config, list(texts.values()))
    tokenizer.save(folder / _TOKENIZER)
    for index, text in texts.items():
        made = tokenize_corpus(
            text.pattern, tokenizer, folder / f"{index:02d}", heldout=config.heldout
        )
        tell(f"{text.pattern}: {made.train.num_tokens:,} training tokens")


def _tokenizer(config: DataConfig, texts: list[Texts]) -> Tokenizer:
    if config.tokenizer is not None:
        if config.tokenizer.startswith("bpe:") and not texts:
            raise ValueError(
                f"data.tokenizer is {config.tokenizer!r}, and data.path is tokenised; expected "
                "the path of the tokenizer that made it"
            )
        return make_tokenizer(
            config.tokenizer, chain.from_iterable(text.texts("train") for text in texts)
        )
    for path in config.paths:
        tokenized = _tokenized_at(path)
        if tokenized is not None:
            return tokenized.tokenizer
        if (Path(path) / MANIFEST).is_file():
            raise ValueError(
                f"data.tokenizer is missing, and data.path {path} is bare shards; expected the "
                "path of the tokenizer that made them"
            )
    return load_tokenizer("bytes")


def sample_texts(texts: Sequence[str], limit: int) -> list[str]:
    """Return about `limit` UTF-8 bytes spread over the texts; 0 is all of them.

    They are the beginnings of evenly spaced texts, each of at least 2 KiB where the text has them.
    """
    if not limit or sum(len(text.encode()) for text in texts) <= limit:
        return list(texts)
    count = min(len(texts), max(1, limit // _SAMPLE_BYTES))
    kept, left = [], limit
    for index in range(count):
        share = left // (count - index)
        part = texts[index * len(texts) // count].encode()[:share].decode(errors="ignore")
        left -= len(part.encode())
        kept.append(part)
    return [part for part in kept if part]
