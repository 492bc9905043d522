"""Claim: two GPUs train as fast as two, by whatever axis the work is shared.

TransNormerLLM on two GPUs of one host, whole updates of the trainer, laid out by the keys of its run
file. Each row is first shown equal to one GPU on a small model, then timed; the most important rows
come first, each is written as it is finished, and none begins after ``--budget`` seconds:

- link: bandwidth of an all-reduce.
- fsdp_one, fsdp: TNL-1B at 8k, each GPU alone, and sharing parameters: weak scaling.
- dp, sp: TNL-1B with 32k tokens a GPU, in rows of a GPU each or in one row over both; compiled,
  and plain ("_plain").
- tp_one, tp: TNL-7B in bfloat16, on each GPU alone and with the heads and channels on both.
- seq_*: one row of 16k, 64k and 128k tokens on both GPUs, blocks computed again: states exchanged
  (tnl), heads exchanged for tokens (Ulysses: tnl_ulysses, llama_ulysses), keys and values gathered
  (llama), and torch's context parallelism (llama_ring).
- largest: the longest row without segments, predicted by ``transnormer plan`` before it is tried.
- co2_none, co2, co2_dp: updates without communication, rounds of CO2, and data parallelism, over
  NCCL's sockets (P2P and shared memory off).
- checkpoint: steps of a run of TNL-1B before a checkpoint and beside its writing.
- segments: a row of 8,388,608 tokens in segments inside each rank, timed once.

Writes benchmarks/results/dist_gpu.json; the last line is JSON.

    python benchmarks/dist_gpu.py --budget 480
    python benchmarks/dist_gpu.py --rows dp sp --profile
    python benchmarks/dist_gpu.py --device cpu     a dry run at toy sizes over gloo: its numbers mean nothing
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import harness
import torch
from dist_gpu_measures import MEASURES
from dist_gpu_ranks import Answer, Ranks
from dist_gpu_subjects import Options, Row
from op_gpu import rounded

RANKS = 2
# NCCL's own switches: neither NVLink or PCIe between the devices, nor memory of the host.
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
RESIDUAL = "train.residual=bfloat16"
FAST = ("train.compile=true", RESIDUAL, "train.activation_memory=0.9")
PLAIN = (RESIDUAL, "train.checkpointing=selective")
AGAIN = (RESIDUAL, "train.checkpointing=full")
SEVEN = (
    "train.weights=bfloat16",
    "optimizer.states=bfloat16",
    "train.checkpointing=full",
    "train.compile=true",
)
COPIES = ("parallel.dp_replicate=2", "parallel.dp_shard=1")
OUTER = (*COPIES, "parallel.outer.method=co2", "parallel.outer.tau=auto")
ASYNC = "train.save_async=true"
DP, SP, TP = "parallel.dp_shard=2", "parallel.sp=2", "parallel.tp=2"
GPU_TOKENS, LONGEST = 32_768, 1 << 23
LENGTHS = (16_384, 65_536, 131_072)
SEGMENTS = (RESIDUAL, "train.segment_tokens=32768", SP)


def rows_of_the_run() -> tuple[Row, ...]:
    """All rows, the most important first."""
    both, long, two = 2 * GPU_TOKENS, (GPU_TOKENS,), (2 * GPU_TOKENS,)

    def lengths(name: str, peer: str = "", subject: str = "tnl") -> Row:
        return Row(
            name, "lengths", LENGTHS, 0, subject, settings=(*AGAIN, SP), peer=peer, steps=3,
            warmup=2, seconds=80.0,
        )  # fmt: skip

    return (
        Row("link", "link"),
        Row("fsdp_one", tokens=GPU_TOKENS, alone=True, settings=FAST),
        Row("fsdp", tokens=both, settings=(*FAST, DP)),
        Row("dp", lengths=long, tokens=both, settings=(*FAST, DP), steps=6),
        Row("sp", lengths=two, settings=(*FAST, SP), steps=6),
        Row("tp_one", size="7b", alone=True, settings=SEVEN, steps=5),
        Row("tp", size="7b", settings=(*SEVEN, TP), steps=5),
        lengths("seq_tnl"),
        lengths("seq_llama_ring", "ring", "llama"),
        lengths("seq_llama_ulysses", "ulysses", "llama"),
        lengths("seq_tnl_ulysses", "ulysses"),
        Row("co2_none", size="385m", tokens=GPU_TOKENS, alone=True, settings=FAST, slow=True),
        Row("co2", "outer", size="385m", tokens=both, settings=(*FAST, *OUTER), slow=True),
        Row("co2_dp", size="385m", tokens=both, settings=(*FAST, *COPIES), steps=4, slow=True),
        Row("co2_link", "link", slow=True),
        Row("largest", "largest", (4_096,), settings=(*AGAIN, SP), seconds=70.0),
        Row("checkpoint", "checkpoint", tokens=both, settings=(*PLAIN, DP, ASYNC), seconds=120.0),
        Row(
            "segments", "lengths", (1 << 18, LONGEST), settings=SEGMENTS, warmup=1, steps=1,
            seconds=260.0,
        ),
        Row("dp_plain", lengths=long, tokens=both, settings=(*PLAIN, DP), steps=6),
        Row("sp_plain", lengths=two, settings=(*PLAIN, SP), steps=6),
        lengths("seq_llama", "", "llama"),
    )  # fmt: skip


def combined(row: Row, answer: Answer) -> dict[str, Any]:
    """What the ranks told as one row: times of the first, memory of the fullest."""
    first, *others = answer.found
    made = dict(first)
    made |= {
        key: max([first[key], *(x[key] for x in others if key in x)])
        for key in ("peak_gb", "reserved_gb", "in_use_gb")
        if key in first
    }
    for length in row.lengths if row.kind == "lengths" else ():
        inner = [x[str(length)] for x in answer.found if str(length) in x]
        if inner and "peak_gb" in inner[0]:
            made[str(length)] |= {"peak_gb": max(x["peak_gb"] for x in inner)}
    if row.alone and "step_ms" in first:
        made["each_step_ms"] = [x["step_ms"] for x in answer.found]
        made["step_ms"] = statistics.mean(made["each_step_ms"])
        made["tokens_per_second"] = sum(x["tokens_per_second"] for x in answer.found)
        made["tokens"] = sum(x["tokens"] for x in answer.found)
    if answer.error is not None:
        # Rows are made longer until one does not fit.
        ended = row.kind == "largest" and "reached_tokens" in made
        made["ended_by" if ended else "error"] = answer.error
    return made


def verdicts(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The targets of the rows that were measured, each with its value and whether it is met."""
    made: dict[str, Any] = {}

    def judge(name: str, value: float, goal: float, *, most: bool = False) -> None:
        met = value <= goal if most else value >= goal
        made[name] = {"value": value, "at_most" if most else "at_least": goal, "met": met}

    def have(key: str, *names: str) -> bool:
        return all(key in rows.get(name, {}) for name in names)

    for name, over, label in (
        ("fsdp", "fsdp_one", "weak scaling of fsdp"),
        ("sp", "dp", "sp over dp, tokens/s"),
        ("sp_plain", "dp_plain", "sp over dp without compilation, tokens/s"),
    ):
        if have("tokens_per_second", name, over):
            judge(label, rows[name]["tokens_per_second"] / rows[over]["tokens_per_second"], 0.95)
    if have("step_ms", "tp", "tp_one"):
        judge(
            "tp step over one GPU's",
            rows["tp"]["step_ms"] / rows["tp_one"]["step_ms"],
            0.65,
            most=True,
        )
    if have("peak_gb", "tp", "tp_one"):
        judge(
            "tp memory over one GPU's",
            rows["tp"]["peak_gb"] / rows["tp_one"]["peak_gb"],
            0.6,
            most=True,
        )
    for length in map(str, LENGTHS):
        for name in ("seq_tnl_ulysses", "seq_llama_ulysses", "seq_llama_ring", "seq_llama"):
            if have(length, name, "seq_tnl"):
                times = [rows[x][length]["step_ms"] for x in (name, "seq_tnl")]
                judge(f"{name} step over seq_tnl's at {length}", times[0] / times[1], 1.0)
    if have(str(LONGEST), "segments"):
        judge("longest row, tokens", rows["segments"][str(LONGEST)]["tokens"], 8e6)
    if have("reached_tokens", "largest"):
        longest = rows["largest"]
        judge(
            "longest row without segments over the predicted one",
            longest["reached_tokens"] / longest["predicted_tokens"],
            1.0,
        )
    if have("round_ms", "co2") and have("step_ms", "co2_none"):
        alone = rows["co2"]["tau"] * rows["co2_none"]["step_ms"]
        judge(
            "co2 round over updates without communication",
            rows["co2"]["round_ms"] / alone,
            1.05,
            most=True,
        )
    if have("beside_ms", "checkpoint"):
        saved = rows["checkpoint"]
        judge(
            "steps beside a checkpoint over those before it",
            saved["beside_ms"] / saved["step_ms"],
            1.1,
            most=True,
        )
    return made


def link_facts() -> dict[str, Any]:
    """How the devices are linked, and what NCCL is told."""
    facts: dict[str, Any] = {
        "gpus": torch.cuda.device_count(),
        "variables": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
    }
    if torch.cuda.is_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if shutil.which("nvidia-smi") is not None:
        run = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False
        )
        facts["topology"] = [
            " ".join(x.split()) for x in run.stdout.splitlines() if x.startswith("GPU")
        ]
    return facts


def show(name: str, row: dict[str, Any]) -> None:
    """Print a row, and its kernels under it."""
    short = {key: value for key, value in row.items() if key not in ("kernels", "settings")}
    print(f"{name}: {json.dumps(rounded(short))}", flush=True)
    for kernel in row.get("kernels", ()):
        print(f"    {kernel['ms']:8.3f} ms {kernel['count']:5d} x {kernel['name']}")


def main() -> None:
    rows = {row.name: row for row in rows_of_the_run()}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW")
    parser.add_argument("--profile", type=int, nargs="?", const=25, default=0, metavar="KERNELS")
    parser.add_argument("--budget", type=float, default=1e9, help="start no row after so many s")
    parser.add_argument("--add", type=Path, help="an earlier result whose other rows are kept")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "dist_gpu.json")
    options = parser.parse_args()
    dry = options.device == "cpu"
    if not dry and torch.cuda.device_count() < RANKS:
        parser.error(f"{torch.cuda.device_count()} GPUs; expected {RANKS}, or --device cpu")
    began = time.monotonic()
    environment = harness.gpu_environment(options.commit) | {"link": link_facts()}
    result: dict[str, Any] = {
        "benchmark": "dist_gpu", "environment": environment, "rows": {}, "verdicts": {},
    }  # fmt: skip
    if options.add is not None:
        result["rows"] = harness.rows_of_an_earlier(options.add)
    if dry:
        result["dry_run"] = "numbers mean nothing"
    pools: dict[bool, Ranks] = {}
    for name in options.rows:
        row, spent = rows[name], time.monotonic() - began
        if spent >= options.budget:
            result["rows"].setdefault(name, {"left_out": "the seconds were spent"})
            continue
        if row.slow not in pools:
            for pool in pools.values():
                pool.close()
            pools = {row.slow: Ranks(RANKS, SOCKETS if row.slow else None)}
        limit = min(row.seconds, options.budget - spent + 20)
        asked = Options(dry=dry, kernels=options.profile)
        found = combined(row, pools[row.slow].run(MEASURES[row.kind], row, asked, limit=limit))
        found |= {"settings": list(row.settings), "wall_s": time.monotonic() - began - spent}
        result["rows"][name] = found
        show(name, found)
        result["verdicts"] = verdicts(result["rows"])
        harness.publish(result, options.output, ("benchmark",))
    for pool in pools.values():
        pool.close()
    result["failures"] = [name for name, row in result["rows"].items() if "error" in row]
    for name, verdict in result["verdicts"].items():
        print(f"{name}: {json.dumps(rounded(verdict))}")
    harness.publish(result, options.output, ("benchmark", "verdicts", "failures"))


if __name__ == "__main__":
    main()
