"""Counts of what happened to the documents of a unit; those of two units add up."""

from collections import Counter
from typing import Any

from transnormer.clean.excerpt import begins
from transnormer.clean.item import DROPPED, QUARANTINED, Item

_EXAMPLES = 3
_COUNTERS = (
    "documents",
    "bytes",
    "reasons",
    "reason_bytes",
    "edited_documents",
    "edits",
    "pii",
    "language_documents",
    "language_bytes",
    "sources_read",
    "sources_kept",
    "lengths_read",
    "lengths_kept",
)


class Tally:
    """Counters by name, and the first few examples of each reason.

    The counters: documents and bytes by read, kept, dropped and quarantined; reasons as
    "step: reason"; edits by rule, in documents and in times; pii by kind; documents and bytes by
    language; documents by the field `source`; documents by length, in powers of two of bytes.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        data = data or {}
        self.counts: dict[str, Counter[str]] = {
            name: Counter(data.get(name, {})) for name in _COUNTERS
        }
        self.examples: dict[str, list[dict[str, str]]] = dict(data.get("examples", {}))

    def read(self, item: Item) -> None:
        """Count an item as it came in."""
        self._add("documents", "read", 1)
        self._add("bytes", "read", item.read_bytes)
        self._add("sources_read", source_of(item), 1)
        self._add("lengths_read", _bucket(item.read_bytes), 1)

    def left(self, item: Item) -> None:
        """Count an item that goes no further: dropped or quarantined."""
        out = item.out or DROPPED
        self._add("documents", out, 1)
        self._add("bytes", out, item.read_bytes)
        step = "read" if out == QUARANTINED else item.why["step"]
        reason = str(item.why["reason"]).split(":")[0].split(" at ")[0]
        name = f"{step}: {reason}"
        self._add("reasons", name, 1)
        self._add("reason_bytes", name, item.read_bytes)
        shown = self.examples.setdefault(name, [])
        if len(shown) < _EXAMPLES:
            shown.append({"id": item.id, "begins": begins(item.text)})

    def kept(self, item: Item, size: int) -> None:
        """Count an item that is in the corpus with this many bytes of text."""
        self._add("documents", "kept", 1)
        self._add("bytes", "kept", size)
        self._add("sources_kept", source_of(item), 1)
        self._add("lengths_kept", _bucket(size), 1)
        self._add("language_documents", item.language, 1)
        self._add("language_bytes", item.language, size)
        for name, times in item.edits.items():
            if times:
                self._add("edited_documents", name, 1)
                self._add("edits", name, times)
        for span in item.pii:
            self._add("pii", span[2], 1)

    def merge(self, other: "Tally") -> None:
        """Add another's counts to these."""
        for name, counter in other.counts.items():
            self.counts[name].update(counter)
        for name, shown in other.examples.items():
            mine = self.examples.setdefault(name, [])
            mine += shown[: _EXAMPLES - len(mine)]

    def dump(self) -> dict[str, Any]:
        """A dictionary for JSON, the most frequent first."""
        counts = {name: dict(counter.most_common()) for name, counter in self.counts.items()}
        return {**counts, "examples": self.examples}

    def _add(self, counter: str, name: str, value: int) -> None:
        self.counts[counter][name] += value


def source_of(item: Item) -> str:
    """Where a document says it is from: its field `source`."""
    source = item.metadata.get("source")
    return source if isinstance(source, str) else "unnamed"


def _bucket(size: int) -> str:
    return str(max(0, size).bit_length())
