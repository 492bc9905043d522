"""A corpus cut into a training part and a held-out part, always the same way."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from transnormer.data.document import Document
from transnormer.data.documents import EMBEDDED, find_files, read_documents
from transnormer.data.embedded import Split, embedded_documents, embedded_hash

DEFAULT_HELDOUT = 0.1
HELDOUT_NAME = "data.heldout"


class Corpus:
    """Documents of a path, directory, glob or "embedded", in two parts that can be read again.

    - heldout is a path or glob: its documents are held out, and all other files of `pattern` are for
      training.
    - heldout is a fraction and the corpus is one single document: its last part, counted in
      characters, is held out.
    - heldout is a fraction otherwise: that share of the documents (one at least, all but one at
      most) is held out, namely those whose names hash lowest; order and other files play no part.
    - heldout is None: a tenth; for "embedded" the split by modules that belongs to it.
    - heldout is 0: nothing is held out.
    """

    def __init__(
        self, pattern: str, *, heldout: float | str | None = None, name: str = "data.path"
    ) -> None:
        """Look at the documents once, to count them. Raises what read_documents raises.

        Args:
            pattern: what read_documents takes.
            heldout: what is held out, see above.
            name: what messages call the pattern.
        """
        self.pattern, self.name = pattern, name
        self._other: str | None = heldout if isinstance(heldout, str) else None
        self._own_split = pattern == EMBEDDED and (heldout is None or heldout == EMBEDDED)
        fraction = DEFAULT_HELDOUT if heldout is None else heldout
        self.fraction = 0.0 if isinstance(fraction, str) else float(fraction)
        if not 0 <= self.fraction < 1:
            raise ValueError(
                f"{HELDOUT_NAME} is {heldout}; expected 0 <= fraction < 1, or the path of a held-out "
                "text"
            )
        self._heldout: frozenset[int] = frozenset()
        self._other_files: frozenset[Path] = frozenset()
        if self._other is not None and self._other != EMBEDDED:
            found = find_files(self._other, name=HELDOUT_NAME)
            self._other_files = frozenset(path.resolve() for path in found)
        self._single = False
        if self.fraction and not self._own_split:
            self._choose()
        elif not self._own_split:
            next(self._read())

    def _read(self) -> Iterator[Document]:
        return read_documents(self.pattern, name=self.name, without=self._other_files)

    def _choose(self) -> None:
        keys = []
        for number, document in enumerate(self._read()):
            digest = hashlib.sha256(document.id.encode("utf-8", "surrogatepass")).digest()
            keys.append((digest, number))
        self._single = len(keys) == 1
        if not self._single:
            count = min(max(1, round(self.fraction * len(keys))), len(keys) - 1)
            self._heldout = frozenset(number for _, number in sorted(keys)[:count])

    @property
    def has_heldout(self) -> bool:
        """Whether there is a held-out part."""
        return self._own_split or self._other is not None or self.fraction > 0

    def source(self, split: Split) -> str:
        """Return what messages and manifests call a part of the corpus."""
        if split == "train":
            return self.pattern
        return self._other if self._other is not None else f"{self.pattern} (held out)"

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the documents of "train" or "heldout"; call it again to read them again."""
        if split not in ("train", "heldout"):
            raise ValueError(f"split is {split!r}; expected 'train' or 'heldout'")
        if self._own_split or (self.pattern == EMBEDDED and self._other and split == "train"):
            yield from embedded_documents(split)
        elif self._other is not None:
            yield from (
                self._read() if split == "train" else read_documents(self._other, name=HELDOUT_NAME)
            )
        elif self._single:
            yield from self._part_of_one(next(self._read()), split)
        else:
            for number, document in enumerate(self._read()):
                if (number in self._heldout) == (split == "heldout"):
                    yield document

    def _part_of_one(self, document: Document, split: Split) -> Iterator[Document]:
        cut = int(len(document.text) * (1 - self.fraction))
        text = document.text[:cut] if split == "train" else document.text[cut:]
        if not text:
            raise ValueError(
                f"{self.name} is {self.pattern!r} with {len(document.text)} characters; expected "
                f"enough for a {split} part of it; give more text or set {HELDOUT_NAME} to 0"
            )
        yield Document(f"{document.id}:{split}", text)

    def texts(self, split: Split) -> Iterator[str]:
        """Yield the texts of "train" or "heldout"."""
        return (document.text for document in self.documents(split))

    def summary(self) -> str:
        """Return one line: documents and UTF-8 bytes of each part; the hash for "embedded"."""
        parts = []
        for split in ("train", "heldout"):
            if split == "heldout" and not self.has_heldout:
                continue
            sizes = [len(text.encode("utf-8")) for text in self.texts(split)]
            parts.append(f"{split} {len(sizes):,} documents {sum(sizes):,} bytes")
        if self.pattern == EMBEDDED:
            parts.append(f"sha256 {embedded_hash()[:16]}")
        return f"{self.pattern}: " + ", ".join(parts)


def first_characters(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Yield texts until about `limit` characters have gone by; the last one may be cut."""
    left = limit
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
