"""The comparison of layouts runs at a toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from train_cases import some_text

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "dist_cpu.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_layouts_are_compared_with_one_process(tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text(some_text(8000))
    sizes = ["--steps", "6", "--samples", "4", "--seq", "32", "--eval-bytes", "500", "--tau", "2"]
    rows = ["sharded x sequence", "co2, tau 2"]
    command = [sys.executable, str(SCRIPT), str(text), *sizes, "--output", str(output)]
    run = subprocess.run(
        [*command, "--rows", *rows], capture_output=True, text=True, timeout=280, check=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert result == json.loads(output.read_text(encoding="utf-8"))
    alone, exact, local = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["one process", *rows]
    assert alone["largest_difference"] == 0.0
    assert exact["largest_difference"] < 1e-6 < local["largest_difference"]
