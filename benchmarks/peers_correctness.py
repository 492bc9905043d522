"""Claim: this package is right where others are not, over a grid that includes the edges.

Runs the grid of correctness.py on ours and on each peer that can be imported, each in processes of
its own (a fault of one kernel must not hide what others do), fresh memory filled with NaN, results
and gradients compared with float64. Writes benchmarks/results/peers_correctness.json and a table
beside it as .md; the last line is JSON. Exit code 1 if ours is wrong or imprecise anywhere.

FLA's tuners try up to 48 candidates for each size; here they have the first and the last of each
list (--all-candidates leaves them alone, which takes tens of minutes).

    python benchmarks/peers_correctness.py                 under 3 minutes on an H100
    python benchmarks/peers_correctness.py --device cpu    a dry run on a few small cases
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
from correctness import WRONG, Case, grid, judge, limit_of, markdown, shard, tallies, toy_grid
from subjects import LINEAR_PEERS, Subject, error_text, ours

PEERS = {peer.name: peer for peer in LINEAR_PEERS}


def _few_candidates() -> None:
    """Leave Triton's tuners the first and last of their candidates, before a peer is imported."""
    from triton.runtime.autotuner import Autotuner

    original: Any = Autotuner.__init__

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **options: Any) -> None:
        few = configs if len(configs) < 3 else [configs[0], configs[-1]]
        original(self, fn, arg_names, few, *rest, **options)

    Autotuner.__init__ = init


def run_subject(
    subject: Subject, cases: list[Case], device: str, deadline: float
) -> list[dict[str, Any]]:
    """Entries of all cases; those after the deadline, or after a lost device, say so."""
    try:
        call = subject.load()
    except Exception as error:
        return [{"case": "all", "dtype": "", "left_out": error_text(error)}]
    entries: list[dict[str, Any]] = []
    for i, case in enumerate(cases):
        left = [{"case": c.name, "dtype": c.dtype} for c in cases[i:]]
        if time.monotonic() > deadline:
            why = f"the seconds were spent before {len(left)} cases, {case.name} the first"
            return [*entries, left[0] | {"left_out": why}]
        try:
            entries += judge(subject, call, case, device)
        except Exception as error:
            # Only a lost device comes here.
            lost = {"raised": f"device lost: {error_text(error)}"}
            why = f"the device was lost before {len(left) - 1} more cases"
            return [*entries, left[0] | lost, left[0] | {"left_out": why}]
    return entries


def work(options: argparse.Namespace) -> None:
    """One subject's share of the grid, in this process; writes its entries."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory: Any = torch.utils.deterministic
    memory.fill_uninitialized_memory = True
    name, index, count = options.work[0], int(options.work[1]), int(options.work[2])
    if options.device == "cuda" and name != "ours" and not options.all_candidates:
        _few_candidates()
    subject = ours(options.implementation) if name == "ours" else PEERS[name]
    cases = shard(grid() if options.device == "cuda" else toy_grid(), index, count)
    deadline = time.monotonic() + options.budget
    entries = run_subject(subject, cases, options.device, deadline)
    options.output.write_text(json.dumps(entries), encoding="utf-8")


def start(options: argparse.Namespace, name: str, index: int, output: Path) -> subprocess.Popen:
    """A process for one share; its workspace of cuBLAS is what deterministic sums ask for."""
    command = ["env", "CUBLAS_WORKSPACE_CONFIG=:4096:8", sys.executable, "-W", "ignore", __file__]
    command += ["--work", name, str(index), str(options.shards), "--device", options.device]
    command += ["--implementation", options.implementation, "--output", str(output)]
    command += ["--budget", str(options.budget)]
    command += ["--all-candidates"] if options.all_candidates else []
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def collect(options: argparse.Namespace, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Run all shares beside each other; entries by subject."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for name in names:
            for index in range(options.shards):
                output = Path(folder) / f"{name}-{index}.json"
                running.append((name, output, start(options, name, index, output)))
        limit = time.monotonic() + options.budget + 60.0
        for name, output, process in running:
            try:
                _, stderr = process.communicate(timeout=max(1.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                stderr = "killed: a call did not come back"
            if process.returncode == 0:
                found[name] += json.loads(output.read_text(encoding="utf-8"))
            else:
                message = (stderr.strip().splitlines() or ["no message"])[-1][:300]
                found[name].append({"case": "all", "dtype": "", "raised": f"process: {message}"})
    return found


def failures_of_ours(entries: list[dict[str, Any]]) -> list[str]:
    """What keeps the exit code from being 0."""
    found = [
        f"{entry['case']}: {entry[kind]}"
        for entry in entries
        for kind in ("raised", "refused", "left_out")
        if kind in entry
    ]
    for result, by_dtype in tallies(entries).items():
        for dtype, counts in by_dtype.items():
            if counts.wrong or counts.imprecise:
                found.append(
                    f"{result} {dtype}: {counts.wrong} wrong, {counts.imprecise} imprecise of "
                    f"{counts.checks}, worst {counts.worst:.2g} (limit "
                    f"{limit_of(result, dtype):g}) at {counts.example}"
                )
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["ours", *PEERS]
    parser.add_argument("--subjects", nargs="+", choices=names, default=names)
    parser.add_argument("--implementation", help="of ours; default triton, on a CPU chunked")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shards", type=int, default=4, help="processes for each subject")
    parser.add_argument("--budget", type=float, default=140.0, help="seconds of each process")
    parser.add_argument("--all-candidates", action="store_true", help="let peers tune fully")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "peers_correctness.json")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.implementation = options.implementation or (
        "triton" if options.device == "cuda" else "chunked"
    )
    return options


def main() -> int:
    options = parse()
    if options.work:
        work(options)
        return 0
    started = time.monotonic()
    found = collect(options, options.subjects)
    failures = failures_of_ours(found.get("ours", []))
    environment = harness.gpu_environment(options.commit)
    versions = environment["peers"] | {
        key: environment[key] for key in ("device", "torch", "triton", "commit")
    }
    table = markdown(found, versions)
    summary = {
        name: {
            result: {dtype: counts._asdict() for dtype, counts in by_dtype.items()}
            for result, by_dtype in tallies(entries).items()
        }
        for name, entries in found.items()
    }
    result: dict[str, Any] = {
        "benchmark": "peers_correctness",
        "environment": environment,
        "cases": len(grid() if options.device == "cuda" else toy_grid()),
        "failures": failures,
        "summary": summary,
        "entries": [
            {"who": name} | entry
            for name, entries in found.items()
            for entry in entries
            if is_notable(name, entry)
        ],
        "wall_s": time.monotonic() - started,
    }
    if options.device == "cpu":
        result["dry_run"] = "a few small cases on a CPU"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    for failure in failures:
        print(f"FAILED: {failure}")
    harness.publish(result, options.output, ("benchmark", "failures", "wall_s"))
    return 1 if failures else 0


def is_notable(name: str, entry: dict[str, Any]) -> bool:
    """Whether an entry tells more than the counts: nothing computed, or wrong, or ours imprecise."""
    if "errors" not in entry:
        return True
    limit = limit_of(entry["result"], entry["dtype"]) if name == "ours" else WRONG
    return max(entry["errors"]) > limit


if __name__ == "__main__":
    sys.exit(main())
