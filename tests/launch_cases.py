"""What a started process does when another one fails; importable by it, and quickly."""

import os
import time
from pathlib import Path


def fail_or_clean_up(folder: Path) -> None:
    """On rank 1 an error as soon as there is a folder; rank 0 removes it, a little later."""
    if os.environ["RANK"] == "0":
        folder.mkdir()
        try:
            time.sleep(0.5)
        finally:
            folder.rmdir()
        return
    while not folder.exists():
        time.sleep(0.01)
    raise ValueError("rank 1 fails")
