"""What people are shown of a document."""

_SHOWN = 240


def begins(text: str) -> str:
    """The head of a text, for people to look at."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
