"""Refusing to write what a foreign layout cannot say."""

from typing import Any


def refuse_difference(have: Any, can: Any, where: str, layout: str) -> None:
    """Raise NotImplementedError naming the first field in which two tables differ.

    Args:
        have: the configuration that is to be written, as a table.
        can: what a reader of the layout would make of it.
        where: name of the tables, for the message.
        layout: name of the layout, for the message.
    """
    if isinstance(have, dict) and isinstance(can, dict):
        for key, value in have.items():
            refuse_difference(value, can.get(key), f"{where}.{key}", layout)
    elif isinstance(have, list | tuple) and isinstance(can, list | tuple):
        for index, (value, other) in enumerate(zip(have, can, strict=True)):
            refuse_difference(value, other, f"{where}[{index}]", layout)
    elif have != can:
        raise NotImplementedError(
            f"{where} is {have!r}; expected {can!r}, which is all that the {layout} layout can "
            "say here; save with layout='transnormer'"
        )
