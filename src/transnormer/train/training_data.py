"""From data.path to what a run reads: a tokenizer, token shards and held-out texts.

What is made from text is kept in the run directory, so that a resumed run reads the very same
tokens whatever has become of the files at data.path. A record beside it says which shards belong to
the run and how they were; a resumed run reads those or none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from transnormer.config import Config, validate
from transnormer.data import (
    Corpus,
    Document,
    Tokenizer,
    TokenSource,
    bpe_size,
    embedded_documents,
    load_tokenizer,
    make_tokenizer,
    open_tokenized,
    read_documents,
    write_shards,
)
from transnormer.data.corpus import HELDOUT_NAME
from transnormer.data.documents import EMBEDDED, find_files
from transnormer.data.embedded import Split
from transnormer.data.shards import MANIFEST
from transnormer.files import atomic_directory, read_json, sha256, write_json
from transnormer.models.checkpoint import find_tokenizer
from transnormer.train.recipe import DataConfig, RunConfig

_TOKENIZER, _RECORD = "tokenizer", "data.json"
_SAMPLE_BYTES = 2048


class TrainingData(NamedTuple):
    """What a run reads.

    Attributes:
        tokenizer: of all sources.
        sources: token shards, each with its weight in the mixture.
        heldout: the texts that are kept out of training; empty where there are none.
    """

    tokenizer: Tokenizer
    sources: tuple[tuple[TokenSource, float], ...]
    heldout: tuple[str, ...]


class Part(Config):
    """One directory of shards.

    Attributes:
        split: what it is for.
        made: whether this run made it; it is then inside the run's data.
        directory: inside the run's data, or as data.path names it.
        sha256: of its manifest, which holds the hashes of its other files.
    """

    split: Split
    made: bool
    directory: str
    sha256: str


class Record(Config):
    """All that a run reads; training parts are in the order of data.path."""

    format: Literal["transnormer-run-data-1"] = "transnormer-run-data-1"
    parts: tuple[Part, ...]


def open_training_data(
    config: RunConfig, folder: Path, tell: Callable[[str], None]
) -> TrainingData:
    """Read the data of a run from `folder`, and make it there first where it is not there yet.

    Raises FileNotFoundError and ValueError where data.path, data.tokenizer or data.heldout give
    nothing usable, and ValueError for shards that are damaged, of another tokenizer, or not those
    with which the run began.
    """
    if not folder.is_dir():
        with atomic_directory(folder) as temporary:
            _prepare(config, temporary, tell)
    tokenizer = load_tokenizer(folder / _TOKENIZER)
    record = validate(Record, read_json(folder / _RECORD), source=str(folder / _RECORD))
    opened: dict[str, list[TokenSource]] = {"train": [], "heldout": []}
    for part in record.parts:
        source = _open(part, folder)
        source.check_tokenizer(tokenizer)
        opened[part.split].append(source)
    epochs = config.data.epochs or [1.0] * len(opened["train"])
    weights = config.data.weights or [
        share * len(source) for share, source in zip(epochs, opened["train"], strict=True)
    ]
    heldout = [
        tokenizer.decode(ids[:-1].tolist())
        for source in opened["heldout"]
        for _, _, ids in source.documents()
    ]
    return TrainingData(
        tokenizer, tuple(zip(opened["train"], weights, strict=True)), tuple(heldout)
    )


def _open(part: Part, folder: Path) -> TokenSource:
    directory = folder / part.directory if part.made else Path(part.directory)
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(
            f"{manifest} is missing; expected the file with which the run began; put it back, or "
            "start another run"
        )
    if sha256(manifest) != part.sha256:
        raise ValueError(
            f"{manifest} has changed since the run began; expected the file as it was; put it "
            "back, or start another run"
        )
    return TokenSource(directory)


def _prepare(config: RunConfig, folder: Path, tell: Callable[[str], None]) -> None:
    data = config.data
    _refuse_overlap(data.paths)
    _refuse_share(data)
    given = given_tokenizer(config)
    size = bpe_size(data.tokenizer or "") if given is None else given.vocab_size
    config.model.rows(size or 0, mask=config.objective.kind == "masked")
    texts = [
        None if _tokenised(path) else Corpus(path, heldout=data.heldout) for path in data.paths
    ]
    found = [text for text in texts if text is not None]
    for text in found:
        tell(text.summary())
    tokenizer = given
    if tokenizer is None:
        training = chain.from_iterable(text.texts("train") for text in found)
        tokenizer = make_tokenizer(data.tokenizer or "", training)
    tokenizer.save(folder / _TOKENIZER)
    parts: list[Part] = []

    def write(documents: Iterable[Document], name: str, split: Split, source: str) -> None:
        manifest = write_shards(documents, tokenizer, folder / name / split, source=source)
        digest = sha256(folder / name / split / MANIFEST)
        parts.append(Part(split=split, made=True, directory=f"{name}/{split}", sha256=digest))
        what = "training" if split == "train" else "held-out"
        tell(f"{source}: {manifest.num_tokens:,} {what} tokens")

    for index, (path, text) in enumerate(zip(data.paths, texts, strict=True)):
        if text is None:
            parts += _tokenised_parts(Path(path), own_heldout=data.heldout is None)
            continue
        write(text.documents("train"), f"{index:02d}", "train", text.source("train"))
        if text.has_heldout and not isinstance(data.heldout, str):
            write(text.documents("heldout"), f"{index:02d}", "heldout", text.source("heldout"))
    if isinstance(data.heldout, str):
        write(_heldout_documents(data), "named", "heldout", data.heldout)
    write_json(Record(parts=tuple(parts)).model_dump(mode="json"), folder / _RECORD)


def _tokenised(path: str) -> list[Path]:
    """Return the training shards at a path: bare ones, or of a folder that `tokenize` made."""
    folders = [Path(path), Path(path) / "train"]
    return [folder for folder in folders if (folder / MANIFEST).is_file()][:1]


def _tokenised_parts(path: Path, *, own_heldout: bool) -> list[Part]:
    folders: list[tuple[Split, Path]] = [("train", folder) for folder in _tokenised(str(path))]
    if own_heldout and folders[0][1] != path and (path / "heldout").exists():
        folders.append(("heldout", path / "heldout"))
    return [
        Part(split=split, made=False, directory=str(folder), sha256=sha256(folder / MANIFEST))
        for split, folder in folders
    ]


def _heldout_documents(data: DataConfig) -> Iterator[Document]:
    """Read the held-out text that data.heldout names."""
    if data.heldout == EMBEDDED and EMBEDDED in data.paths:
        return iter(embedded_documents("heldout"))
    return read_documents(str(data.heldout), name=HELDOUT_NAME)


def _refuse_overlap(paths: Sequence[str]) -> None:
    """Raise ValueError for a file that two entries of data.path hold."""
    seen: dict[str | Path, str] = {}
    for path in paths:
        files: list[str | Path] = [EMBEDDED]
        if path != EMBEDDED:
            files = [file.resolve() for file in _tokenised(path) or find_files(path)]
        for file in files:
            if file in seen:
                raise ValueError(
                    f"data.path holds {file} twice, as {seen[file]!r} and as {path!r}; expected "
                    "every text once; remove one of them, or give it a larger weight"
                )
            seen[file] = path


def _refuse_share(data: DataConfig) -> None:
    """Raise ValueError for a share of a corpus that is cut already."""
    if isinstance(data.heldout, float) and data.heldout:
        for path in data.paths:
            if _tokenised(path):
                raise ValueError(
                    f"data.heldout is {data.heldout}; expected it unset, since data.path is "
                    f"tokenised: {path}; leave it out, or name a held-out text"
                )


def given_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Return the tokenizer that exists already; None where it must be trained.

    Raises ValueError and FileNotFoundError where none is named and none belongs to the data or to
    model.init_from.
    """
    data, initial = config.data, config.model.init_from
    if data.tokenizer is None and initial is not None:
        found = find_tokenizer(initial)
        if found is None:
            raise FileNotFoundError(
                f"model.init_from is {initial}, which holds no tokenizer; expected one beside the "
                "weights; set data.tokenizer to the one it was trained with"
            )
        return load_tokenizer(found)
    if data.tokenizer is not None:
        if bpe_size(data.tokenizer) is None:
            return load_tokenizer(data.tokenizer)
        if all(_tokenised(path) for path in data.paths):
            raise ValueError(
                f"data.tokenizer is {data.tokenizer!r}, and data.path is tokenised; expected "
                "the path of the tokenizer that made it"
            )
        return None
    for path in data.paths:
        if (Path(path) / MANIFEST).is_file():
            raise ValueError(
                f"data.tokenizer is missing, and data.path {path} is bare shards; expected the "
                "path of the tokenizer that made them"
            )
        if _tokenised(path):
            return open_tokenized(Path(path)).tokenizer
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
