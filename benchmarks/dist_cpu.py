"""Claim: how far each way to share a run among four processes comes on the same tokens.

A small TransNormerLLM on one text, the same samples in the same order, by one process and by four that
talk over gloo: data, sharded, sequence and tensor parallel, whose losses are those of one process
within float32's error, and copies that update on their own between outer steps. Prints a table; the
last line is JSON, which also goes to benchmarks/results/dist_cpu.json.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from dist_gpu_ranks import Ranks

from transnormer.config import validate
from transnormer.eval.perplexity import score_texts
from transnormer.train import EvaluationReport, RunConfig, run_training

PROCESSES = 4
# The [parallel] table of each row.
LAYOUTS: dict[str, dict[str, Any]] = {
    "data parallel": {"dp_replicate": 4},
    "sharded (FSDP)": {"dp_shard": 4},
    "sequence (LASP)": {"sp": 4},
    "tensor parallel": {"tp": 4},
    "sharded x sequence": {"dp_shard": 2, "sp": 2},
}
METHODS = ("local_sgd", "slowmo", "diloco", "co2", "co2_eager")
# Steps at the beginning and at the end of which figures are told.
_FEW = 20


def run_config(arguments: argparse.Namespace, parallel: dict[str, Any], folder: Path) -> RunConfig:
    """The run of a row."""
    data = {
        "model": {"model_dim": 64, "num_layers": 2, "heads": 4, "glu_dim": 128},
        "data": {"path": str(arguments.text), "seq": arguments.seq, "heldout": 0.1},
        "train": {
            "steps": arguments.steps,
            "tokens_per_step": arguments.samples * arguments.seq,
            "precision": "float32",
            "device": "cpu",
            "eval_bytes": arguments.eval_bytes,
        },
        "optimizer": {"lr": 2e-3, "warmup": min(20, arguments.steps), "schedule": "cosine"},
        "parallel": parallel,
        "output": {"dir": str(folder)},
    }
    return validate(RunConfig, data, source="dist_cpu")


def train(tell: Callable[..., None], config: RunConfig) -> None:
    """The part of one process in a row: what ``transnormer train`` does under torchrun."""
    torch.set_num_threads(1)
    done = run_training(config, evaluate=score_texts)
    assert isinstance(done.last, EvaluationReport)
    tell(heldout=done.last.bits_per_byte)


def losses(config: RunConfig) -> list[float]:
    """Training losses of a run, step by step."""
    lines = (Path(config.output.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def tables(tau: int) -> dict[str, dict[str, Any]]:
    """The [parallel] tables of all rows on several processes."""
    local = {
        f"{method}, tau {tau}": {"dp_replicate": 4, "outer": {"method": method, "tau": tau}}
        for method in METHODS
    }
    return {**LAYOUTS, **local}


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All rows; the first is one process."""
    rows: list[dict[str, Any]] = []
    exact: list[float] = []
    pools = {1: Ranks(1), PROCESSES: Ranks(PROCESSES)}
    names = {"one process": {}, **tables(arguments.tau)}
    if arguments.rows:
        names = {name: names[name] for name in ("one process", *arguments.rows)}
    try:
        for number, (name, parallel) in enumerate(names.items()):
            config = run_config(arguments, parallel, folder / str(number))
            processes = PROCESSES if parallel else 1
            answer = pools[processes].run(train, config, limit=1800.0)
            if answer.error is not None:
                raise RuntimeError(f"{name}: {answer.error}")
            found = losses(config)
            exact = exact or found
            # Layouts that sum gradients differ by rounding, which training then makes more of.
            apart = [abs(a - b) / b for a, b in zip(found, exact, strict=True)]
            rows.append(
                {
                    "name": name,
                    "parallel": parallel,
                    "processes": processes,
                    "train_loss": statistics.fmean(found[-_FEW:]),
                    "heldout_bits_per_byte": answer.found[0]["heldout"],
                    "largest_difference_first_20": max(apart[:_FEW]),
                    "largest_difference": max(apart),
                }
            )
            print(f"{name}: {rows[-1]['heldout_bits_per_byte']:.4f}", flush=True)
    finally:
        for pool in pools.values():
            pool.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=16, help="of a step, by all processes")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--rows", nargs="*", help="names of rows; all of them unless given")
    parser.add_argument("--tau", type=int, default=5)
    parser.add_argument("--eval-bytes", type=int, default=32768)
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "dist_cpu.json")
    arguments = parser.parse_args()
    facts = harness.environment(arguments.commit) | {"threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    harness.print_table(
        ("layout", "training nats", "held-out bits", "apart, 20 steps", "apart"),
        [
            (
                row["name"],
                f"{row['train_loss']:.4f}",
                f"{row['heldout_bits_per_byte']:.4f}",
                f"{row['largest_difference_first_20']:.0e}",
                f"{row['largest_difference']:.0e}",
            )
            for row in rows
        ],
    )
    result = {
        "benchmark": "dist_cpu",
        "environment": facts,
        "text": arguments.text.name,
        "steps": arguments.steps,
        "tokens": arguments.steps * arguments.samples * arguments.seq,
        "tau": arguments.tau,
        "rows": rows,
    }
    harness.publish(result, arguments.output)


if __name__ == "__main__":
    main()
