"""Texts with a class each: reading them, a split, tokens on disk, padded batches."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transnormer.data.document import Document
from transnormer.data.documents import find_files, read_records
from transnormer.data.order import Rows, hash_key, permute
from transnormer.data.shards import TokenSource, write_shards
from transnormer.data.split import split_by_key
from transnormer.data.tokenizers.base import Tokenizer

_TOKENS, LABELS = "tokens", "labels.npy"
# Classes that a message lists.
_NAMED = 10


class Fields(NamedTuple):
    """Which fields of a line hold what.

    Attributes:
        text: the text.
        label: the class: a string, an integer or a boolean; with choices an index into them.
        choices: the names of all classes, the same in every line; None where lines have none.
    """

    text: str
    label: str
    choices: str | None = None


class Labelled(NamedTuple):
    """One text with its class; the name is file:line."""

    name: str
    text: str
    label: str | int


class LabelledTexts(NamedTuple):
    """The lines of some files; choices are the names of all classes where the files hold them."""

    texts: list[Labelled]
    choices: tuple[str, ...] | None


def read_labelled(
    pattern: str, fields: Fields, *, name: str = "data.path", without: Collection[Path] = ()
) -> LabelledTexts:
    """Read files of JSON lines, plain or as .xz, .gz or .zst.

    Args:
        pattern: a file, a directory or a glob; of the last two only .jsonl files are read.
        fields: of each line.
        name: what messages call the pattern.
        without: files to leave out, as resolved paths.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: a line that is not as it should be (file and line are named), no line at all.
    """
    texts: list[Labelled] = []
    choices: tuple[str, ...] | None = None
    for path in find_files(pattern, name=name):
        if path.resolve() in without or ".jsonl" not in [s.lower() for s in path.suffixes]:
            continue
        for where, record in read_records(path):
            line = _read_line(where, record, fields)
            if fields.choices is not None:
                found = _read_choices(where, record, fields)
                choices = choices or found
                if found != choices:
                    raise ValueError(
                        f"{where}: {fields.choices} is {list(found)}; expected {list(choices)} as "
                        "before: classes are the same in every line"
                    )
                if not isinstance(line.label, int) or not 0 <= line.label < len(choices):
                    raise ValueError(
                        f"{where}: {fields.label} is {line.label!r}; expected an index into "
                        f"{fields.choices}, 0 to {len(choices) - 1}"
                    )
                line = line._replace(label=choices[line.label])
            texts.append(line)
    if not texts and without:
        raise ValueError(
            f"{name} is {pattern!r}, all of which is held out or empty; expected other lines of "
            "JSON beside it; make data.heldout a share, or another file"
        )
    if not texts:
        raise ValueError(
            f"{name} is {pattern!r}, which holds no line of JSON; expected .jsonl files, one object "
            "on each line"
        )
    return LabelledTexts(texts, choices)


def _read_line(where: str, record: Any, fields: Fields) -> Labelled:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no object; expected one on each line")
    for field in fields:
        if field is not None and field not in record:
            known = ", ".join(sorted(map(str, record))) or "none"
            raise ValueError(f"{where} has no field {field!r}; expected it; its fields are {known}")
    text, label = record[fields.text], record[fields.label]
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: {fields.text} is {text!r}; expected a text that is not empty")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(
            f"{where} holds a lone surrogate; expected text that UTF-8 can hold; remove it"
        )
    if isinstance(label, bool):
        label = str(label).lower()
    if not isinstance(label, str | int):
        raise ValueError(
            f"{where}: {fields.label} is {label!r}; expected a string, an integer or a boolean"
        )
    return Labelled(where, text, label)


def _read_choices(where: str, record: dict[str, Any], fields: Fields) -> tuple[str, ...]:
    found = record[fields.choices or ""]
    good = isinstance(found, list) and all(isinstance(name, str) for name in found)
    if not good or len(set(found)) != len(found):
        raise ValueError(
            f"{where}: {fields.choices} is {found!r}; expected a list of different strings"
        )
    return tuple(found)


def split_labelled(
    texts: Sequence[Labelled], share: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Cut texts into a training part and a held-out part, both in their order.

    That share of the different texts (one at least, all but one at most) is held out whose SHA-256,
    salted with the seed, is lowest: neither the order nor the place of files plays a part, and a
    text that occurs twice is on one side.
    """
    return split_by_key(texts, [text.text for text in texts], share, seed)


def find_classes(texts: Iterable[Labelled]) -> tuple[str | int, ...]:
    """Return the classes of the training part, sorted.

    Raises ValueError for fewer than two, and for strings beside integers, which have no order.
    """
    classes = {text.label for text in texts}
    kinds = {type(label).__name__ for label in classes}
    if len(kinds) > 1:
        raise ValueError("labels are integers and strings; expected one kind; write them alike")
    if len(classes) < 2:
        raise ValueError(
            f"the training part has {len(classes)} class: {list(classes)}; expected at least 2"
        )
    return tuple(sorted(classes, key=lambda x: (x if isinstance(x, int) else 0, str(x))))


def write_labelled(
    texts: Sequence[Labelled],
    classes: Sequence[str | int],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    source: str,
) -> None:
    """Tokenise texts into a new directory that LabelledSource reads.

    Args:
        texts: none of them empty.
        classes: what the stored numbers count.
        tokenizer: needs an end-of-text token.
        directory: must not exist yet.
        source: where the texts came from, for the manifest.

    Raises ValueError, with file and line, for a text of another class.
    """
    number = {label: index for index, label in enumerate(classes)}
    for text in texts:
        if text.label not in number:
            known = ", ".join(map(str, classes[:_NAMED])) + (", ..." if classes[_NAMED:] else "")
            raise ValueError(
                f"{text.name}: label is {text.label!r}; expected a class of the training part: "
                f"{known}; hold out other texts, or remove it"
            )
    documents = (Document(text.name, text.text) for text in texts)
    write_shards(documents, tokenizer, directory / _TOKENS, source=source)
    np.save(directory / LABELS, np.array([number[text.label] for text in texts], dtype="<i8"))


class LabelledSource:
    """A directory of tokenised texts with a class each.

    Attributes:
        tokens: the texts; document i is text i.
        labels: int64 [texts].
    """

    def __init__(self, directory: Path) -> None:
        """Open what write_labelled made; ValueError or FileNotFoundError for anything else."""
        self.tokens = TokenSource(Path(directory) / _TOKENS)
        path = Path(directory) / LABELS
        try:
            self.labels = np.load(path, allow_pickle=False).astype(np.int64)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); start another run") from None
        if self.labels.shape != (self.tokens.num_documents,):
            raise ValueError(
                f"{path} has shape {list(self.labels.shape)}; expected one label for each of "
                f"{self.tokens.num_documents} texts; start another run"
            )

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """Return the tokens of each text, int64 [texts], the end-of-text token left out."""
        return np.diff(self.tokens.document_ends, prepend=0) - 1

    def most_frequent(self) -> int:
        """Return the class that most texts have; of several the first."""
        counts = Counter(self.labels.tolist())
        return min(counts, key=lambda label: (-counts[label], label))


class LabelledBatch(NamedTuple):
    """Padded texts with their classes.

    Attributes:
        input_ids: int64 [batch, longest]: the start token, the text, pads.
        mask: bool [batch, longest], False at pads.
        labels: int64 [batch].
    """

    input_ids: Tensor
    mask: Tensor
    labels: Tensor


class LabelledLoader(Rows):
    """Batches of texts in an order that depends on (seed, sample index) alone.

    Sample k of the run is text k mod n of epoch k // n; each epoch has an order of its own.
    """

    def __init__(
        self, source: LabelledSource, *, seq: int, batch: int, seed: int, cut: str = "end"
    ) -> None:
        """Read a source.

        Args:
            source: the texts.
            seq: tokens at most, with the start token; longer texts are cut.
            batch: texts of a batch, over all ranks.
            seed: another seed, another order.
            cut: which "end" of a longer text is left out, its "start" or its "end".
        """
        super().__init__(batch)
        if seq < 2:
            raise ValueError(f"data.seq is {seq}; expected at least 2: a start token and a text")
        if cut not in ("start", "end"):
            raise ValueError(f"cut is {cut!r}; expected 'start' or 'end'")
        self.source, self.seq, self.seed, self.cut = source, seq, seed, cut

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (epoch, text) of a global sample index."""
        epoch, place = divmod(sample, len(self.source))
        return epoch, permute(place, len(self.source), hash_key(self.seed, epoch))

    def batch(self, step: int) -> LabelledBatch:
        """Return batch `step`; any step, in any order, as often as wanted."""
        return self.collate([self.locate(sample)[1] for sample in self.samples(step)])

    def in_order_of_length(self) -> Iterator[LabelledBatch]:
        """Yield all texts once, in batches of texts of similar length, the longest first."""
        order = np.argsort(-self.source.lengths(), kind="stable").tolist()
        for start in range(0, len(order), self.batch_size):
            yield self.collate(order[start : start + self.batch_size])

    def collate(self, texts: Sequence[int]) -> LabelledBatch:
        """Return a batch of these texts, pads at the right."""
        rows = [self._ids(index) for index in texts]
        longest = max(map(len, rows))
        start = self.source.tokens.manifest.start_id
        input_ids = np.full((len(rows), longest), start, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=bool)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return LabelledBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(mask),
            torch.from_numpy(self.source.labels[list(texts)]),
        )

    def _ids(self, index: int) -> np.ndarray:
        text = self.source.tokens.document(index)[:-1]
        room = self.seq - 1
        kept = text[:room] if self.cut == "end" else text[-room:]
        return np.concatenate([[self.source.tokens.manifest.start_id], kept])
