"""What a document is."""

from typing import NamedTuple


class Document(NamedTuple):
    """One text with a name.

    Attributes:
        id: the document's own id, else the file's path, or path:line for a line of a .jsonl file.
        text: not empty, and UTF-8 can hold it.
    """

    id: str
    text: str
