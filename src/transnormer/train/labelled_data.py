"""From data.path to what a classification run reads: a tokenizer, labelled texts, classes.

It is kept in the run directory, so that a resumed run reads the very same texts in the very same
parts whatever has become of the files at data.path.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from transnormer.config import Config, validate
from transnormer.data import Fields, LabelledSource, Tokenizer, load_tokenizer, make_tokenizer
from transnormer.data.classification import (
    LABELS,
    Labelled,
    find_classes,
    read_labelled,
    split_labelled,
    write_labelled,
)
from transnormer.data.corpus import DEFAULT_HELDOUT, HELDOUT_NAME
from transnormer.data.documents import find_files
from transnormer.data.shards import MANIFEST
from transnormer.files import atomic_directory, read_json, sha256, write_json
from transnormer.train.kept_data import check_unchanged
from transnormer.train.objective_config import ClassificationConfig
from transnormer.train.recipe import RunConfig
from transnormer.train.training_data import given_tokenizer

_TOKENIZER, _RECORD = "tokenizer", "data.json"
_TRAIN, _HELDOUT = "train", "heldout"
# Classes whose shares are told.
_SHOWN = 10


class LabelledData(NamedTuple):
    """What a run reads; heldout is None where nothing is held out."""

    tokenizer: Tokenizer
    classes: tuple[str, ...]
    train: LabelledSource
    heldout: LabelledSource | None


class LabelledRecord(Config):
    """All that a classification run reads.

    Attributes:
        classes: their names; a label is an index into them.
        sha256: of each part's manifest (which holds the hashes of its other files) and labels.
    """

    format: Literal["transnormer-run-labels-1"] = "transnormer-run-labels-1"
    classes: tuple[str, ...]
    sha256: dict[str, str]


def open_labelled_data(
    config: RunConfig, folder: Path, tell: Callable[[str], None]
) -> LabelledData:
    """Read the data of a run from `folder`, and make it there first where it is not there yet.

    Raises FileNotFoundError and ValueError where data.path, data.heldout or data.tokenizer give
    nothing usable, and ValueError for files that are not those with which the run began.
    """
    if not folder.is_dir():
        with atomic_directory(folder) as temporary:
            _prepare(config, temporary, tell)
    record = validate(LabelledRecord, read_json(folder / _RECORD), source=str(folder / _RECORD))
    check_unchanged(folder, record.sha256)
    parts = {name.split("/")[0] for name in record.sha256}
    return LabelledData(
        load_tokenizer(folder / _TOKENIZER),
        record.classes,
        LabelledSource(folder / _TRAIN),
        LabelledSource(folder / _HELDOUT) if _HELDOUT in parts else None,
    )


def _prepare(config: RunConfig, folder: Path, tell: Callable[[str], None]) -> None:
    objective, data = config.objective, config.data
    assert isinstance(objective, ClassificationConfig)
    path = data.paths[0]
    if any(Path(path, place, MANIFEST).is_file() for place in (".", "train")):
        raise ValueError(
            f"data.path is {path!r}, which is tokenised; expected JSON lines with "
            f"{objective.text_field!r} and {objective.label_field!r}: tokens have no classes"
        )
    fields = Fields(objective.text_field, objective.label_field, objective.choices_field)
    if isinstance(data.heldout, str):
        without = {file.resolve() for file in find_files(data.heldout, name=HELDOUT_NAME)}
        train, choices = read_labelled(path, fields, without=without)
        heldout, others = read_labelled(data.heldout, fields, name=HELDOUT_NAME)
        if others != choices:
            raise ValueError(
                f"{HELDOUT_NAME} is {data.heldout!r} with the choices {list(others or ())}; "
                f"expected {list(choices or ())}, as data.path has"
            )
    else:
        train, choices = read_labelled(path, fields)
        heldout = []
        share = DEFAULT_HELDOUT if data.heldout is None else data.heldout
        if share:
            train, heldout = split_labelled(train, share, objective.split_seed)
    classes = choices or find_classes(train)
    tell(f"{path}: {len(train):,} training texts, {len(heldout):,} held out; {_shares(train)}")
    tokenizer = given_tokenizer(config) or make_tokenizer(
        data.tokenizer or "", (text.text for text in train)
    )
    config.model.rows(tokenizer.vocab_size)
    tokenizer.save(folder / _TOKENIZER)
    hashes = {}
    for name, texts in ((_TRAIN, train), (_HELDOUT, heldout)):
        if texts:
            write_labelled(texts, classes, tokenizer, folder / name, source=path)
            files = (f"{name}/tokens/{MANIFEST}", f"{name}/{LABELS}")
            hashes |= {file: sha256(folder / file) for file in files}
    _tell_cut(LabelledSource(folder / _TRAIN), config, tell)
    record = LabelledRecord(classes=tuple(map(str, classes)), sha256=hashes)
    write_json(record.model_dump(mode="json"), folder / _RECORD)


def _shares(texts: Sequence[Labelled]) -> str:
    """The classes' shares of the texts, of the first classes only where there are many."""
    counts, classes = Counter(text.label for text in texts), find_classes(texts)
    shares = [f"{label} {counts[label] / len(texts):.1%}" for label in classes[:_SHOWN]]
    more = len(classes) - len(shares)
    return ", ".join([*shares, f"and {more:,} more classes"] if more else shares)


def _tell_cut(source: LabelledSource, config: RunConfig, tell: Callable[[str], None]) -> None:
    longer = int((source.lengths() > config.data.seq - 1).sum())
    if longer:
        tell(f"{longer:,} training texts have more than data.seq = {config.data.seq} tokens: cut")
