"""The choice of an implementation: rows in order of preference, each with its reason for "no"."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Implementation(NamedTuple):
    """One way to run an op.

    Attributes:
        name: what callers pass as ``implementation``.
        refuse: takes the call's facts; returns None where the row can run, else the error to
            raise when the row was named: NotImplementedError for a form that does not exist,
            RuntimeError for an environment that lacks something.
        run: the function itself.
        automatic: False for a form that only runs when it is named.
    """

    name: str
    refuse: Callable[[Any], Exception | None]
    run: Callable[..., Any]
    automatic: bool = True


def choose(op: str, rows: Sequence[Implementation], request: Any, name: str) -> Implementation:
    """Return the named row, or for "auto" the first automatic one that can run the request.

    Raises:
        ValueError: an unknown name.
        NotImplementedError, RuntimeError: the named row's own reason.
        RuntimeError: no row can run; the message holds every reason.
    """
    if name != "auto":
        for row in rows:
            if row.name == name:
                error = row.refuse(request)
                if error is not None:
                    raise error
                return row
        names = ", ".join(repr(row.name) for row in rows)
        raise ValueError(f"implementation of {op} is {name!r}; expected 'auto', {names}")
    reasons = []
    for row in rows:
        if row.automatic:
            error = row.refuse(request)
            if error is None:
                return row
            reasons.append(f"{row.name}: {error}")
    raise RuntimeError(f"{op} has no implementation for this call: {'; '.join(reasons)}")
