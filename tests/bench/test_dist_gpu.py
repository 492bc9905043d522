"""The benchmark of two GPUs: what its rows promise, and a dry run over gloo."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__(name)


def test_every_promise_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    dist_gpu = module("dist_gpu", monkeypatch)
    rate, step = {"tokens_per_second": 2.0}, {"step_ms": 1.0, "peak_gb": 3.0}
    made = dist_gpu.verdicts(
        {
            "fsdp_one": rate,
            "fsdp": {"tokens_per_second": 1.94},
            "tp_one": step,
            "tp": {"step_ms": 0.7, "peak_gb": 1.5},
            "seq_tnl": {"16384": {"step_ms": 2.0}},
            "seq_llama_ring": {"16384": {"step_ms": 3.0}, "65536": {"step_ms": 9.0}},
            "co2_none": {"step_ms": 10.0},
            "co2": {"round_ms": 52.0, "tau": 5},
        }
    )
    assert {name: verdict["met"] for name, verdict in made.items()} == {
        "weak scaling of fsdp": True,
        "tp step over one GPU's": False,
        "tp memory over one GPU's": True,
        "seq_llama_ring step over seq_tnl's at 16384": True,
        "co2 round over updates without communication": True,
    }


def test_what_ends_the_longest_row_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    dist_gpu = module("dist_gpu", monkeypatch)
    row = next(row for row in dist_gpu.rows_of_the_run() if row.name == "largest")
    told = [{"reached_tokens": 8, "peak_gb": 2.0}, {"reached_tokens": 8, "peak_gb": 3.0}]
    made = dist_gpu.combined(row, dist_gpu.Answer(told, "rank 1: out of memory"))
    assert made == {"reached_tokens": 8, "peak_gb": 3.0, "ended_by": "rank 1: out of memory"}


@pytest.mark.slow
def test_a_dry_run_takes_every_path(tmp_path: Path) -> None:
    output = tmp_path / "dist.json"
    command = [sys.executable, str(BENCHMARKS / "dist_gpu.py"), "--device", "cpu"]
    command += ["--commit", "abc", "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["failures"] == []
    # The kernels that torch's ring knows are of GPUs.
    assert {n for n, row in result["rows"].items() if "not_available" in row} == {"seq_llama_ring"}
    assert all("check" in row for n, row in result["rows"].items() if n in ("sp", "tp", "segments"))
