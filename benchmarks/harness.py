"""What the benchmarks share: timing, facts about the machine, limits measured, results on disk."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def seconds(call: Callable[[], object], *, repeats: int, budget: float = 10.0) -> float:
    """Median wall time of one call: a warm-up, then up to ``repeats`` within about ``budget``.

    A call that alone exceeds half of the budget is timed once, without a second warm-up.
    """
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first > budget / 2:
        return first
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if sum(times) > budget:
            break
    return statistics.median(times)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of this checkout, with "+changes" where files differ from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "HEAD") or "unknown") + changed


def environment() -> dict[str, Any]:
    """Facts that a figure means nothing without."""
    return {
        "device": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }


def measured_limits() -> dict[str, float]:
    """Copy and matmul rates of this machine, float32, right now: what other figures compare to."""
    x, y = torch.randn(1 << 24), torch.empty(1 << 24)
    copy = seconds(lambda: y.copy_(x), repeats=20, budget=2.0)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    matmul = seconds(lambda: a @ b, repeats=20, budget=2.0)
    return {
        "copy_gb_per_s": 2 * x.numel() * 4 / copy / 1e9,
        "matmul_gflop_per_s": 2 * 1024**3 / matmul / 1e9,
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def publish(result: dict[str, Any], output: Path) -> None:
    """Write the result, and print it as one line of JSON: the last of stdout."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(output)
    print(json.dumps(result))
