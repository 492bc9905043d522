"""Drafts of the next tokens from the text itself: prompt lookup, which needs no second model."""

from collections.abc import Iterable


class PromptLookup:
    """Proposes what followed the last occurrence of the tokens that a text ends with.

    A token costs a few entries of a table, however long the text is. After Saxena 2023 (prompt
    lookup decoding), a form of speculative decoding (Leviathan et al. 2023, arXiv:2211.17192).

    Args:
        ids: the text so far.
        longest: tokens at the end that are looked for, first all of them, then fewer.
    """

    def __init__(self, ids: Iterable[int] = (), *, longest: int = 3) -> None:
        self._ids: list[int] = []
        self._longest = longest
        # From some tokens in a row to where the text went on after they were seen last.
        self._after: dict[tuple[int, ...], int] = {}
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Go on with the text by a token."""
        end = len(self._ids)
        for size in range(1, min(self._longest, end) + 1):
            self._after[tuple(self._ids[end - size :])] = end
        self._ids.append(token)

    def propose(self, count: int) -> list[int]:
        """Up to ``count`` tokens that may come next; empty where the text has not been here."""
        for size in range(min(self._longest, len(self._ids)), 0, -1):
            start = self._after.get(tuple(self._ids[-size:]))
            if start is not None:
                return self._ids[start : start + count]
        return []
