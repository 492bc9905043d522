"""From text to shards: what `transnormer tokenize` and the trainer call."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from transnormer.data.corpus import Corpus, first_characters
from transnormer.data.embedded import Split
from transnormer.data.shards import Manifest, TokenSource, write_shards
from transnormer.data.tokenizers import BpeTokenizer, Tokenizer, load_tokenizer, train_bpe
from transnormer.data.tokenizers.bpe import SMALLEST, Digits
from transnormer.data.tokenizers.seeds import common_han
from transnormer.files import atomic_directory, write_synced

TRAIN: Split = "train"
HELDOUT: Split = "heldout"
TOKENIZER = "tokenizer"
# More text than this changes a vocabulary little and takes minutes.
BPE_CHARACTERS = 100_000_000
_BPE_PREFIX = "bpe:"


class TokenizedCorpus(NamedTuple):
    """Where a tokenised corpus lies, and what is in it; heldout is None where nothing is held out."""

    directory: Path
    tokenizer: Tokenizer
    train: Manifest
    heldout: Manifest | None

    def open(self, split: str = TRAIN, *, verify: bool = True) -> TokenSource:
        """Open the shards of "train" or "heldout"."""
        source = TokenSource(self.directory / split, verify=verify)
        source.check_tokenizer(self.tokenizer)
        return source


def bpe_size(spec: str | Path) -> int | None:
    """Return N of a tokenizer that is "bpe:N", None for one that exists already.

    Raises ValueError where N is no number of ids that a byte-level BPE can have.
    """
    if not str(spec).startswith(_BPE_PREFIX):
        return None
    number = str(spec).removeprefix(_BPE_PREFIX)
    if not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise ValueError(f"data.tokenizer is {spec!r}; expected bpe:N with N a number of ids")
    if int(number) < SMALLEST:
        raise ValueError(f"data.tokenizer is {spec!r}; expected bpe:N with N at least {SMALLEST}")
    return int(number)


def make_tokenizer(spec: str | Path, train_texts: Iterator[str]) -> Tokenizer:
    """Load the tokenizer that `spec` names, or train it: "bpe:4096" is a BPE of 4,096 ids.

    Args:
        spec: "bpe:N", or what load_tokenizer takes.
        train_texts: texts of the training part; read for "bpe:N" alone, 100 million characters at
            most.
    """
    size = bpe_size(spec)
    if size is None:
        return load_tokenizer(spec)
    return train_bpe(first_characters(train_texts, BPE_CHARACTERS), size)


def train_tokenizer(
    pattern: str,
    vocab_size: int,
    directory: Path,
    *,
    heldout: float | str | None = None,
    digits: Digits = "threes",
    han: int = 0,
    name: str = "data.path",
) -> BpeTokenizer:
    """Train a byte-level BPE on the training part of a corpus and write it to a directory.

    Args:
        pattern: a file, directory or glob of text, or "embedded".
        vocab_size: number of ids; see train_bpe.
        directory: must not exist yet, or be empty.
        heldout: what the tokenizer must not see; the same default as tokenize_corpus has.
        digits: how digits are cut; see train_bpe.
        han: 3755 or 6763 common Chinese characters become a token each; 0 leaves it to the text.
        name: what messages call the pattern.

    Beside tokenizer.json lies training.json: the arguments and the sha256 of the text.
    """
    with atomic_directory(Path(directory)) as temporary:
        digest = hashlib.sha256()
        texts = Corpus(pattern, heldout=heldout, name=name).texts(TRAIN)
        seen = _hashed(first_characters(texts, BPE_CHARACTERS), digest.update)
        characters = common_han(han) if han else ""
        tokenizer = train_bpe(seen, vocab_size, digits=digits, characters=characters)
        tokenizer.save(temporary)
        facts = {
            "pattern": pattern,
            "heldout": heldout,
            "vocab_size": vocab_size,
            "digits": digits,
            "han": han,
            "sha256_text": digest.hexdigest(),
            "fingerprint": tokenizer.fingerprint,
        }
        write_synced(temporary / "training.json", json.dumps(facts, indent=2).encode("utf-8"))
    return tokenizer


def _hashed(texts: Iterator[str], update: Callable[[bytes], object]) -> Iterator[str]:
    for text in texts:
        update(text.encode("utf-8"))
        yield text


def tokenize_corpus(
    pattern: str,
    tokenizer: Tokenizer | str | Path,
    directory: Path,
    *,
    heldout: float | str | None = None,
    shard_tokens: int = 1 << 27,
    name: str = "data.path",
) -> TokenizedCorpus:
    """Write directory/train, directory/heldout (shards) and directory/tokenizer.

    Args:
        pattern: a file, directory or glob of text, or "embedded".
        tokenizer: a tokenizer, or what make_tokenizer takes; one that is trained sees the training
            part alone.
        directory: must not exist yet, or be empty; open_tokenized reads one that is there.
        heldout: a fraction, or the path of a held-out text; see Corpus.
        shard_tokens: size of a shard.
        name: what messages call the pattern.

    The directory appears when all of it is written.
    """
    directory = Path(directory)
    with atomic_directory(directory) as temporary:
        corpus = Corpus(pattern, heldout=heldout, name=name)
        if isinstance(tokenizer, str | Path):
            tokenizer = make_tokenizer(tokenizer, corpus.texts(TRAIN))
        tokenizer.save(temporary / TOKENIZER)
        manifests = {}
        for split in (TRAIN, HELDOUT) if corpus.has_heldout else (TRAIN,):
            manifests[split] = write_shards(
                corpus.documents(split),
                tokenizer,
                temporary / split,
                source=corpus.source(split),
                shard_tokens=shard_tokens,
            )
    return TokenizedCorpus(directory, tokenizer, manifests[TRAIN], manifests.get(HELDOUT))


def open_tokenized(directory: Path) -> TokenizedCorpus:
    """Open what tokenize_corpus wrote, without reading the text again.

    Raises FileNotFoundError where it is not complete, ValueError where its parts do not agree.
    """
    directory = Path(directory)
    train = TokenSource(directory / TRAIN, verify=False)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    train.check_tokenizer(tokenizer)
    held = None
    if (directory / HELDOUT).exists():
        source = TokenSource(directory / HELDOUT, verify=False)
        source.check_tokenizer(tokenizer)
        held = source.manifest
    return TokenizedCorpus(directory, tokenizer, train.manifest, held)
