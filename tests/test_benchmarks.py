"""The benchmarks run at toy sizes, and end with one JSON object that names its machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOY = {
    "op_cpu.py": ["--lengths", "32", "70", "--heads", "2", "--dim", "16", "--repeats", "1"],
    "decode_cpu.py": ["--contexts", "8", "70", "--steps", "2", "--batches", "1", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOY)
def test_benchmark_ends_with_its_result(name: str, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments = [*TOY[name], "--threads", "1", "--output", str(output)]
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    # On the machine as it is, not in the interpreter that these tests put kernels into.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result == json.loads(output.read_text(encoding="utf-8"))
    assert {"device", "torch", "commit", "command", "threads"} <= set(result["environment"])
    assert result["limits"]["copy_gb_per_s"] > 0
    assert result["rows"]
    assert result["summary"]


def test_published_results_name_their_machine() -> None:
    for path in (BENCHMARKS / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert "environment" in result or "device" in result, path.name
