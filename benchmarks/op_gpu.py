"""Claim: on one GPU linear attention beats every peer, and runs near the limit of its memory.

Compares transnormer.ops.linear_attention with flash-linear-attention, OpenNLPLab's package and
softmax attention, peers beside it in the same run; then packing, flatness, decoding and host time.
Rows are checked against float64 before their times count. A peer that fails costs its own figures;
a failure of ours is recorded and the exit code is 1. Prints tables; the last line is JSON and
holds the verdicts, and benchmarks/results/op_gpu.json all figures, until the end
op_gpu.unfinished.json beside it those there are.

    python benchmarks/op_gpu.py                     everything, about 5 minutes on an H100
    python benchmarks/op_gpu.py --rows quick        two shapes, decoding, host time
    python benchmarks/op_gpu.py --rows 4x32x8192x128 packed --peers ours softmax_cudnn
    python benchmarks/op_gpu.py --merge a.json b.json   one result of runs of different rows
    python benchmarks/op_gpu.py --device cpu        a dry run at toy sizes: its numbers mean nothing
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import op_gpu_gated
import op_gpu_parts
import torch
from gpu_timing import Clock, copy_gb_per_s, gradients, matmul_tflop_per_s
from op_gpu_attention import make_tensors, run_row
from op_gpu_rows import ATTENTION_ROWS, DTYPE_ROWS, LAYERS, PARTS, Row, select, slopes
from subjects import (
    FLA_CHUNK,
    FLA_FUSED,
    LINEAR_PEERS,
    OPENNLPLAB,
    SOFTMAX_ANY,
    SOFTMAX_PEERS,
    Subject,
    error_text,
    is_lost,
    ours,
)

PEERS = {peer.name: peer for peer in (*LINEAR_PEERS, *SOFTMAX_PEERS, SOFTMAX_ANY)}
# The whole result is too long for the last line.
SHORT = ("benchmark", "failures", "summary", "wall_s")
DEFAULT_PEERS = [peer.name for peer in (*LINEAR_PEERS, *SOFTMAX_PEERS)]


def warm_one(name: str, shapes: list[str]) -> None:
    """First forward and backward of a peer in a process of its own; prints their seconds."""
    clock, found = Clock("cuda"), {}
    call = PEERS[name].load()
    for shape in shapes:
        batch, heads, seq, dim = (int(size) for size in shape.split("x"))
        row = Row(batch, heads, seq, dim)
        log_decay = slopes(row.heads, "first_layer", "cuda")
        q, k, v, do = make_tensors(row, PEERS[name].seq_dim, "cuda")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        (o, _), forward = clock.first(lambda leaves=leaves, g=log_decay: call(*leaves, g))
        _, backward = clock.first(lambda o=o, leaves=leaves, do=do: gradients(o, leaves, do))
        found[shape] = {"forward": forward, "backward": backward}
    print(json.dumps(found))


def warm_jobs(rows: list[Row], names: list[str]) -> list[tuple[str, list[str]]]:
    """(peer, shapes) of each process: FLA's candidates are compiled anew for each number of heads
    and dim, at any length; OpenNLPLab's kernels for every shape."""
    rows, jobs = [row for row in rows if row.peers], []
    kinds = {(row.heads, row.dim): row for row in reversed(rows)}
    for name in names:
        if name == OPENNLPLAB.name:
            shapes = [row.name for row in rows]
            jobs += [(name, shapes[i::4]) for i in range(4) if shapes[i::4]]
        elif name in (FLA_CHUNK.name, FLA_FUSED.name):
            jobs += [(name, [row._replace(seq=1024).name]) for row in kinds.values()]
    return jobs


def warm(jobs: list[tuple[str, list[str]]], limit_s: float) -> dict[str, Any]:
    """Compile the peers' kernels in a process a job, side by side, into Triton's disk cache.

    FLA's tuning there is not kept (it would be one under contention); the main process tunes.
    """
    started, running = time.monotonic(), []
    for name, shapes in jobs:
        command = [sys.executable, __file__, "--warm", name, *shapes]
        process = subprocess.Popen(
            ["env", "FLA_CACHE_RESULTS=0", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append((name, shapes, process))
    found = []
    for name, shapes, process in running:
        entry: dict[str, Any] = {"peer": name}
        found.append(entry)
        try:
            left = max(1.0, limit_s - (time.monotonic() - started))
            stdout, stderr = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            entry |= {"shapes": shapes, "error": f"took more than {limit_s:.0f} s"}
            continue
        if process.returncode == 0:
            entry["first_call_s"] = json.loads(stdout.splitlines()[-1])
        else:
            message = (stderr.strip().splitlines() or ["no message"])[-1][:300]
            entry |= {"shapes": shapes, "error": message}
    return {"processes": len(running), "wall_s": time.monotonic() - started, "jobs": found}


def print_attention(results: list[dict[str, Any]]) -> None:
    """Two tables, times and ratios, and each promise with its verdict."""
    times, shares = [], []
    for result in results:
        if "ours" not in result:
            times.append((result["row"], "ours", result["error"][:70], "", "", "", "", ""))
        for layer in LAYERS if "ours" in result else ():
            times.append((result["row"], f"ours, {layer}", *figures(result["ours"][layer])))
        for name, found in result["peers"].items():
            if "forward_ms" in found:
                times.append((result["row"], name, *figures(found)))
            else:
                why = found.get("error", found.get("left_out", ""))
                times.append((result["row"], name, why[:70], "", "", "", "", ""))
        for layer in LAYERS if "ratios" in result else ():
            for name in ("forward", "backward"):
                found = result["ratios"][layer][name]
                best = found.get("best_peer", "-")
                cells = [f"{found[p]:.2f}" if p in found else "-" for p in (*DEFAULT_PEERS, "best")]
                shares.append((result["row"], layer, name, *cells, best))
    header = ("row", "who", "fwd ms", "bwd ms", "fwd % floor", "bwd % floor", "MiB", "first s")
    harness.print_table(header, times)
    for result in results:
        for layer in LAYERS if "ours" in result else ():
            if "in_a_graph" in result["ours"][layer]:
                graph = json.dumps(rounded(result["ours"][layer]["in_a_graph"]))
                print(f"{result['row']} ours, {layer}, replays of a graph: {graph}")
    if shares:
        print("\nours / peer")
        harness.print_table(("row", "decay", "pass", *DEFAULT_PEERS, "best", "best peer"), shares)
    for result in results:
        for name, verdict in result.get("targets", {}).items():
            print(
                f"{result['row']} {name}: {verdict['value']:.3f}, at most {verdict['at_most']}: "
                f"{'met' if verdict['met'] else 'MISSED'}"
            )


def print_part(name: str, found: dict[str, Any]) -> None:
    """A part in a few lines."""
    print(f"\n{name}")
    if "rows" not in found:
        for key, value in found.items():
            if key not in ("bounds", "tokens", "heads", "dim"):
                print(f"  {key}: {json.dumps(rounded(value))}")
        return
    for row in found["rows"]:
        print("  " + json.dumps(rounded(row)))
    for key, verdict in found.get("slowest_over_fastest", {}).items():
        print(f"  slowest over fastest, {key}: {json.dumps(rounded(verdict))}")


def rounded(value: Any) -> Any:
    """Numbers to four digits, for reading."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def figures(found: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one row of the table of times."""
    memory, first = found["peak_extra_mib"], found["first_call_s"]
    return (
        f"{found['forward_ms']:.3f}",
        f"{found['backward_ms']:.3f}",
        f"{found['forward_percent_of_floor']:.0f}",
        f"{found['backward_percent_of_floor']:.0f}",
        "-" if memory is None else f"{memory:.0f}",
        f"{first['forward'] + first['backward']:.1f}",
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; ``selected`` holds the names of rows and parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=["all"], help="rows, parts or groups")
    parser.add_argument("--quick", action="store_true", help="the same as --rows quick")
    parser.add_argument("--peers", nargs="+", choices=["ours", *PEERS], default=DEFAULT_PEERS)
    parser.add_argument("--implementation", help="of ours; default triton, on a CPU chunked")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which peers end")
    parser.add_argument("--repeat-ms", type=float, default=100.0, help="of each median")
    parser.add_argument("--no-prepare", action="store_true", help="compile peers one by one")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "op_gpu.json")
    parser.add_argument("--merge", nargs="+", type=Path, help="results of runs to put into one")
    parser.add_argument("--warm", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.selected = select(["quick"] if options.quick else options.rows)
    except ValueError as error:
        parser.error(str(error))
    options.implementation = options.implementation or (
        "triton" if options.device == "cuda" else "chunked"
    )
    return options


def fla_is_tuned(rows: list[dict[str, Any]]) -> bool:
    """Whether a row of this run has tuned FLA for 32 heads of 128."""
    return any(
        "forward_ms" in row["peers"].get(FLA_CHUNK.name, {})
        and (row["shape"]["heads"], row["shape"]["dim"]) == (32, 128)
        for row in rows
    )


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs: rows and parts of later ones replace those of earlier ones.

    Every row and part keeps the number of its run in ``runs``, which holds what differs by run.
    """
    merged: dict[str, Any] = {"benchmark": "op_gpu", "environment": results[0]["environment"]}
    rows: dict[str, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    for index, result in enumerate(results):
        kept = ("environment", "implementation", "limits", "prepare", "failures", "wall_s")
        runs.append({key: result[key] for key in kept if key in result})
        rows |= {row["row"]: row | {"run": index} for row in result["rows"]}
        merged |= {part: result[part] | {"run": index} for part in PARTS if part in result}
    order = [row.name for row in (*ATTENTION_ROWS, *DTYPE_ROWS)]
    merged["rows"] = sorted(rows.values(), key=lambda row: order.index(row["row"]))
    limits = next((run_["limits"] for run_ in runs if "limits" in run_), {})
    merged |= {"runs": runs, "limits": limits}
    merged["failures"] = [failure for run_ in runs for failure in run_["failures"]]
    merged["wall_s"] = sum(run_["wall_s"] for run_ in runs)
    merged["summary"] = summarise(merged["rows"])
    return merged


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every promise of every row with its verdict."""
    return {
        f"{row['row']} {name}": verdict
        for row in rows
        for name, verdict in row.get("targets", {}).items()
    }


def show(result: dict[str, Any]) -> None:
    """All tables of a result."""
    print_attention(result["rows"])
    for name in PARTS:
        if name in result:
            print_part(name, result[name])
    for failure in result["failures"]:
        print(f"FAILED: {failure}")


def run(options: argparse.Namespace, result: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fill the result row by row, what failed of ours among it, and keep it after each."""
    clock = Clock(options.device, options.repeat_ms)
    started, failures = time.monotonic(), result["failures"]
    rows = [row for row in (*ATTENTION_ROWS, *DTYPE_ROWS) if row.name in options.selected]
    chosen = [PEERS[name] for name in options.peers if name in PEERS]
    compiled = [peer.name for peer in chosen if peer in LINEAR_PEERS]
    jobs = warm_jobs(rows, compiled) if rows else []
    if "gated" in options.selected:
        jobs += op_gpu_gated.warm_jobs()
    if jobs and not clock.dry and not options.no_prepare:
        result["prepare"] = warm(jobs, limit_s=240.0)
        print(f"compiled the peers' kernels in {result['prepare']['wall_s']:.0f} s")
    result["limits"] = {
        "copy_gb_per_s": copy_gb_per_s(clock),
        "bf16_matmul_tflop_per_s": matmul_tflop_per_s(clock),
    }
    clock.free()
    print(f"copy {result['limits']['copy_gb_per_s']:.0f} GB/s")
    subject, deadline = ours(options.implementation), started + options.budget
    for row in rows:
        toy = row.shrunk() if clock.dry else row
        peers: list[Subject] = chosen if row.peers else []
        bandwidth = result["limits"]["copy_gb_per_s"]
        found = run_row(toy, subject, peers, clock, bandwidth, deadline) | {"row": row.name}
        result["rows"].append(found)
        print(f"{row.name}: {found['seconds']:.0f} s")
        if "error" in found:
            failures.append(f"{row.name}: {found['error']}")
        else:
            failures += [
                f"{row.name}, {layer}: errors {found['ours'][layer]['errors']} beyond "
                f"{found['ours'][layer]['limits']}"
                for layer in LAYERS
                if not found["ours"][layer]["within"]
            ]
            failures += [
                f"{row.name}, {layer}, in a graph: {found['ours'][layer]['in_a_graph']['error']}"
                for layer in LAYERS
                if "error" in found["ours"][layer].get("in_a_graph", {})
            ]
        keep()
    for name in [name for name in options.selected if name in PARTS]:
        try:
            extra: dict[str, Any] = {}
            if name == "host":
                extra = {"fla": fla_is_tuned(result["rows"])}
            elif name == "gated":
                extra = {"bandwidth": result["limits"]["copy_gb_per_s"]}
            result[name] = op_gpu_parts.RUN[name](options.implementation, clock, **extra)
            if not result[name].get("within", True):
                failures.append(f"{name}: errors beyond their limits")
        except Exception as error:
            result[name] = {"error": error_text(error)}
            failures.append(f"{name}: {error_text(error)}")
            if is_lost(error):
                raise
        keep()
        clock.free()


def main() -> int:
    options = parse()
    if options.warm and options.warm[0] in op_gpu_gated.KINDS:
        print(json.dumps(op_gpu_gated.warm_one(options.warm[0], options.warm[1:], Clock("cuda"))))
        return 0
    if options.warm:
        warm_one(options.warm[0], options.warm[1:])
        return 0
    if options.merge:
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in options.merge]
        merged = merge(parts)
        show(merged)
        harness.publish(merged, options.output, SHORT)
        return 1 if merged["failures"] else 0
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "benchmark": "op_gpu",
        "environment": harness.gpu_environment(options.commit),
        "implementation": options.implementation,
        "rows": [],
        "failures": [],
    }
    if options.device == "cpu":
        result["dry_run"] = "toy sizes on a CPU: the numbers mean nothing"
    started = time.monotonic()

    # Beside the result, whose place a run that is killed does not take.
    aside = options.output.with_suffix(".unfinished.json")

    def keep() -> None:
        result["wall_s"] = time.monotonic() - started
        result["summary"] = summarise(result["rows"])
        harness.write(result | {"failures": [*result["failures"], "not finished"]}, aside)

    try:
        run(options, result, keep)
    except (Exception, KeyboardInterrupt) as error:
        # The device is gone, or the time; what was measured before is kept.
        result["failures"].append(f"the run ended early: {error_text(error)}")
    keep()
    show(result)
    if not result["rows"] and not any(part in result for part in PARTS):
        aside.unlink()
        print(f"nothing was measured; {options.output} is as it was")
        return 1
    harness.publish(result, options.output, SHORT)
    aside.unlink()
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
