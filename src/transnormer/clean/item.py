"""What flows through the pipeline: a document of datatrove's that knows what happened to it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from datatrove.data import Document

from transnormer.clean.rules.pii import Span
from transnormer.clean.rules.quality import Measures

DROPPED, QUARANTINED = "dropped", "quarantined"


@dataclass(slots=True)
class Item(Document):
    """A document, its other fields in `metadata`.

    Attributes:
        read_bytes: of UTF-8 text, as it was read.
        edits: how often each rule changed the text.
        pii: personal data in the text as it was read.
        language: of the text; empty until it was looked at.
        measures: of the text when it was judged, the last change of it.
        out: where the document went, DROPPED or QUARANTINED; None while it is in the corpus.
        why: what is written of it there.
    """

    read_bytes: int = 0
    edits: Counter[str] = field(default_factory=Counter)
    pii: list[Span] = field(default_factory=list)
    language: str = ""
    measures: Measures | None = None
    out: str | None = None
    why: dict[str, Any] = field(default_factory=dict)

    def drop(self, step: str, reason: str, **more: Any) -> None:
        """Take the document out of the corpus."""
        self.out = DROPPED
        self.why = {"step": step, "reason": reason, **more}


def quarantined(place: str, file: str, line: int, reason: str) -> Item:
    """An input that is no document; its id is where it stands."""
    item = Item(text="", id=place)
    item.out = QUARANTINED
    item.why = {"file": file, "line": line, "reason": reason}
    return item
