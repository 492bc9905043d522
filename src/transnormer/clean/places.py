"""Where a run keeps what it needs between its stages."""

from pathlib import Path
from typing import NamedTuple


class Places(NamedTuple):
    """The directories of a run's intermediate files."""

    logs: Path
    indexed: Path
    found: Path
    pieces: Path
    rounds: Path
    counts: Path
    phrases: Path
    plan: Path

    @classmethod
    def of(cls, output: Path) -> "Places":
        """Those under output/work."""
        work = output / "work"
        return cls(
            work / "logs",
            work / "documents",
            work / "duplicates",
            work / "pieces",
            work / "selfclean",
            work / "counts",
            work / "evaluation.npz",
            work / "plan.json",
        )
