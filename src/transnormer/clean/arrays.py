"""Arrays in files that are whole or absent."""

import io
from pathlib import Path

import numpy as np

from transnormer.files import write_atomic


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file that is whole or absent."""
    buffer = io.BytesIO()
    # A handle and not a name: numpy would add a suffix to the temporary one.
    np.savez(buffer, **arrays)  # pyrefly: ignore[bad-argument-type]
    write_atomic(path, buffer.getvalue())
