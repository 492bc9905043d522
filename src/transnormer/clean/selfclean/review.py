"""A sheet for people: a sample of what was kept and dropped, and their verdicts read back."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transnormer.clean.excerpt import begins

COLUMNS = ("id", "state", "severity", "source", "language", "begins", "verdict")
KEEP, DROP = "keep", "drop"
_DECILES = 10


class Row(NamedTuple):
    """A document of the sheet, without a verdict."""

    id: str
    state: str
    severity: float
    source: str
    language: str
    text: str


def choose(severities: Sequence[float], count: int, seed: int) -> list[int]:
    """Documents for the sheet: as many of each tenth of the severities, at random."""
    order = np.argsort(np.asarray(severities), kind="stable")
    random = np.random.default_rng(seed)
    chosen: list[int] = []
    for part in np.array_split(order, _DECILES):
        take = min(len(part), -(-count // _DECILES))
        chosen += random.choice(part, take, replace=False).tolist() if take else []
    return sorted(chosen, key=lambda number: -severities[number])[:count]


def sheet(rows: Sequence[Row]) -> bytes:
    """The sheet as CSV, its column `verdict` empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for row in rows:
        cells = (row.id, row.state, f"{row.severity:.3f}", row.source, row.language)
        # A cell that begins like a formula would be run by a spreadsheet.
        shown = begins(" ".join(row.text.split()))
        writer.writerow([*cells, f"'{shown}" if shown[:1] in tuple("=+-@") else shown, ""])
    return text.getvalue().encode("utf-8")


def read_verdicts(path: Path) -> dict[str, str]:
    """The verdicts of a sheet by id; rows without one are left out.

    Raises FileNotFoundError, or ValueError that names the file and the row.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"selfclean.verdicts is {str(path)!r}; expected a sheet with columns id and verdict; "
            "check the path"
        )
    verdicts: dict[str, str] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        table = csv.DictReader(stream)
        if not {"id", "verdict"} <= set(table.fieldnames or ()):
            raise ValueError(
                f"{path} has the columns {table.fieldnames}; expected id and verdict among them"
            )
        for number, row in enumerate(table, start=2):
            verdict = (row["verdict"] or "").strip().lower()
            if verdict not in ("", KEEP, DROP):
                raise ValueError(
                    f"{path}: row {number} has the verdict {verdict!r}; expected keep, drop or "
                    "nothing"
                )
            if verdict:
                verdicts[row["id"]] = verdict
    return verdicts
