"""The tiny run of the tests in this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import train_cases

from transnormer.train import RunConfig


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """Build a tiny run in tmp_path/run; arguments are overrides."""
    return lambda *overrides: train_cases.tiny_run(tmp_path, *overrides)
