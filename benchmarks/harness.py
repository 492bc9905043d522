"""What the benchmarks share: timing, facts about the machine, limits measured, results on disk."""

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PEER_PACKAGES = ("flash-linear-attention", "fla-core", "lightning-attn")


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


def _commit(told: str | None = None) -> str:
    """What was told; else the commit of this checkout, "+changes" where files differ from it."""
    root = Path(__file__).parents[1]
    if told or shutil.which("git") is None or not (root / ".git").exists():
        return told or "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "HEAD") or "unknown") + changed


def environment(commit: str | None = None) -> dict[str, Any]:
    """Facts that a figure means nothing without; ``commit`` is for a copy whose history is not its own."""
    return {
        "device": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(commit),
        # Where files lie on one machine is no fact about the figure.
        "command": re.sub(r"(^|[ =])/\S+", r"\1PATH", " ".join(["python", *sys.argv])),
        "date": time.strftime("%Y-%m-%d"),
    }


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """The version of the GPU's driver."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip().partition("\n")[0] or "unknown"


def gpu_environment(commit: str | None = None) -> dict[str, Any]:
    """The facts of ``environment``, and those of the GPU and of the packages compared with."""
    facts = environment(commit) | {
        "cpu": _cpu_name(),
        "triton": version("triton"),
        "peers": {name: version(name) for name in PEER_PACKAGES},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": torch.cuda.get_device_name(0),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return facts


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


class Child:
    """A process of its own that may be started ahead: what it imports costs no time later.

    One that is to wait reads a line of its input before it begins.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Start it."""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def last_json(self, limit: float) -> dict[str, Any]:
        """Let it begin; the last line that it prints, JSON, or {"error": why there is none}."""
        try:
            out, errors = self._process.communicate("begin\n", timeout=limit)
        except subprocess.TimeoutExpired:
            self.stop()
            return {"error": f"not done after {limit:.0f} s"}
        lines = out.splitlines()
        if self._process.returncode or not lines:
            said = " ".join(errors.split())[-400:]
            return {"error": said or f"exit {self._process.returncode}"}
        return json.loads(lines[-1])

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def last_json(command: Sequence[str], limit: float) -> dict[str, Any]:
    """The last line that a process of its own prints, JSON, or {"error": why there is none}."""
    return Child(command).last_json(limit)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def finite(value: Any) -> Any:
    """Infinity and NaN as strings: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def rows_of_an_earlier(
    result: Path, facts: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The rows of a result that were measured, each with the environment of its own call.

    ``facts``: of each row as it is now; one that says otherwise, or of a name that is gone, was
    another row and stays behind.
    """
    earlier = json.loads(result.read_text(encoding="utf-8"))
    return {
        name: {"environment": earlier["environment"]} | row
        for name, row in earlier["rows"].items()
        if "left_out" not in row
        and (facts is None or (name in facts and facts[name].items() <= row.items()))
    }


def write(result: dict[str, Any], output: Path) -> None:
    """Write the result, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(json.dumps(finite(result), indent=1) + "\n", encoding="utf-8")
    temporary.replace(output)


def publish(result: dict[str, Any], output: Path, keys: Sequence[str] = ()) -> None:
    """Write the result, and print it (or these keys of it) as one line of JSON, the last one."""
    write(result, output)
    result = finite(result)
    print(json.dumps({key: result[key] for key in keys} if keys else result))
