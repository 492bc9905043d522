"""Processes that a command starts itself: what is left of them after an error."""

from pathlib import Path

import pytest
from launch_cases import fail_or_clean_up

from transnormer.parallel.launch import call_on_ranks


def test_others_clean_up_after_the_first_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 1 fails"):
        call_on_ranks(2, fail_or_clean_up, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
