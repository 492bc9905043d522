"""What a run keeps of its data must be what it began with."""

from collections.abc import Mapping
from pathlib import Path

from transnormer.files import sha256


def check_unchanged(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise ValueError for the first file of a folder that is absent or has another SHA-256."""
    for name, expected in hashes.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise ValueError(
                f"{folder / name} has changed since the run began; expected the file as it was; "
                "put it back, or start another run"
            )
