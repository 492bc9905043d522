"""Claim: training with float8 products in the blocks follows the loss of bfloat16.

The same model of 12 x 768, 85 M parameters beside the embedding, is trained on the same tokens in the
same order, from the same initial values, by the trainer's own code: in bfloat16 and with each recipe
of train.float8. One more run in bfloat16 has another seed, so other values and another order: what
chance alone does to the figures. All runs share one GPU at once, so seconds mean nothing here
(``train_gpu`` has rows for speed). Each writes its losses step by step; the held-out part is scored
with plain products, as the exported model is used. Writes benchmarks/results/float8_gpu.json; the
last line is JSON.

    python benchmarks/float8_gpu.py --data PATH     a folder that `transnormer tokenize` made
    python benchmarks/float8_gpu.py --device cpu    a dry run at toy sizes: its numbers mean nothing
"""

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, get_args

import harness
from family_gpu import heldout_score
from op_gpu import rounded
from subjects import error_text

from transnormer import load
from transnormer.data import tokenize_corpus
from transnormer.models.float8 import Float8
from transnormer.train import run_training
from transnormer.train.metrics import METRICS, read_records
from transnormer.train.recipe import RunConfig

SIZES = {"model_dim": 768, "num_layers": 12, "heads": 6, "glu_dim": 2_048}
TOY = {"model_dim": 64, "num_layers": 2, "heads": 2, "glu_dim": 96}
SEQ, TOKENS, WARMUP = 2_048, 32_768, 40
TOY_SEQ, TOY_TOKENS = 64, 256
# Steps whose losses are averaged: the noise of one batch is larger than what is looked for.
LAST = 20
_RUN_S = 300.0


class Arm(NamedTuple):
    """One run.

    Attributes:
        float8: its train.float8.
        seed: its train.seed.
    """

    float8: str
    seed: int = 0

    @property
    def name(self) -> str:
        """What it is called on the command line and in the result."""
        kind = "bfloat16" if self.float8 == "none" else self.float8
        return kind if not self.seed else f"{kind}_seed{self.seed}"


ARMS = {arm.name: arm for arm in (*map(Arm, get_args(Float8)), Arm("none", 1))}
BASE = Arm("none").name


def config_of(arm: Arm, data: Path, folder: Path, *, steps: int, dry: bool) -> RunConfig:
    """The run of an arm: the fast settings of a recipe, or toy ones."""
    train: dict[str, Any] = {
        "steps": steps,
        "tokens_per_step": TOY_TOKENS if dry else TOKENS,
        "precision": "bfloat16",
        "residual": "bfloat16",
        "float8": arm.float8,
        "seed": arm.seed,
    }
    if not dry:
        train |= {"compile": True, "cuda_graph": True, "activation_memory": 0.9}
    return RunConfig.model_validate(
        {
            "model": TOY if dry else SIZES,
            "data": {
                "path": str(data),
                "tokenizer": str(data / "tokenizer"),
                "seq": TOY_SEQ if dry else SEQ,
            },
            "train": {**train, "device": "cpu" if dry else "cuda"},
            "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95), "warmup": min(WARMUP, steps // 2)},
            "output": {"dir": str(folder / "run")},
        }
    )


def train(arm: Arm, data: Path, *, steps: int, dry: bool) -> dict[str, Any]:
    """Train an arm; its losses and gradient norms, and the held-out part's score."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arm, data, Path(folder), steps=steps, dry=dry)
        done = run_training(config)
        rows = read_records(done.run_dir / METRICS)
        model = load(done.run_dir, device=config.train.device)
    found: dict[str, Any] = {
        "losses": [round(row["loss"], 5) for row in rows],
        "grad_norms": [round(row["grad_norm"], 5) for row in rows],
        "last_loss": statistics.mean(row["loss"] for row in rows[-LAST:]),
    }
    return found | {"heldout": heldout_score(model, data, config.data.seq)}


def child(arm: str, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """An arm in a process of its own; what it found, or why it found nothing."""
    command = [sys.executable, __file__, "--arm", arm, "--data", str(data)]
    command += ["--device", options.device, "--steps", str(options.steps)]
    return harness.last_json(command, _RUN_S)


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each run differs by from bfloat16 of the same seed, in nats a token."""
    base = rows.get(BASE, {})
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if name == BASE or "error" in row or "losses" not in base:
            continue
        apart = [a - b for a, b in zip(row["losses"], base["losses"], strict=True)]
        found[name] = {
            "last_loss": row["last_loss"] - base["last_loss"],
            "largest": max(map(abs, apart)),
            "heldout": row["heldout"]["nats_per_token"] - base["heldout"]["nats_per_token"],
        }
    return found


def show(rows: dict[str, dict[str, Any]], apart: dict[str, dict[str, float]]) -> None:
    """Print the curves in ten rows, one column a run, and a table of differences."""
    names = [name for name, row in rows.items() if "losses" in row]
    for name in rows.keys() - set(names):
        print(f"{name}: {rows[name]['error']}")
    if not names:
        return
    steps = len(rows[names[0]]["losses"])
    at = sorted({max(round(steps * i / 10), 1) for i in range(11)})
    curves = [[step, *(f"{rows[x]['losses'][step - 1]:.4f}" for x in names)] for step in at]
    harness.print_table(["step", *names], curves)
    header = ["run", f"last {LAST} steps", "less bfloat16", "largest", "held-out", "less bfloat16"]
    table = []
    for name in names:
        row, off = rows[name], apart.get(name, {})
        cells = [f"{row['last_loss']:.4f}", off.get("last_loss"), off.get("largest")]
        cells += [f"{row['heldout']['nats_per_token']:.4f}", off.get("heldout")]
        table.append([name, *(f"{x:+.4f}" if isinstance(x, float) else x or "" for x in cells)])
    harness.print_table(header, table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of token shards")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--steps", type=int, help="of each run; 200, of a dry run 4")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "float8_gpu.json")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dry = options.device == "cpu"
    options.steps = options.steps or (4 if dry else 200)
    if options.arm is not None:
        try:
            found = train(ARMS[options.arm], options.data, steps=options.steps, dry=dry)
        except Exception as error:
            found = {"error": error_text(error)}
        print(json.dumps(harness.finite(found)))
        return
    if options.data is None and not dry:
        parser.error("--data is missing; expected a folder that `transnormer tokenize` made")
    result: dict[str, Any] = {
        "benchmark": "float8_gpu",
        "environment": harness.gpu_environment(options.commit)
        | {"torchao": harness.version("torchao")},
        "sizes": TOY if dry else SIZES,
        "tokens_per_step": TOY_TOKENS if dry else TOKENS,
        "seq": TOY_SEQ if dry else SEQ,
        "rows": {},
    }
    if dry:
        result["dry_run"] = "numbers mean nothing"
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if data is None:
            data = Path(folder) / "data"
            text = Path(folder) / "text.txt"
            text.write_text(4 * Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
            tokenize_corpus(str(text), "bytes", data)
        # Compiling is the host's work: the runs do it side by side. Each is written when it has ended.
        with ThreadPoolExecutor(1 if dry else len(options.arms)) as pool:
            running = {pool.submit(child, arm, data, options): arm for arm in options.arms}
            for done in as_completed(running):
                result["rows"][running[done]] = done.result()
                print(
                    f"{running[done]}: {result['rows'][running[done]].get('last_loss')}", flush=True
                )
                harness.publish(result, options.output, ("benchmark",))
    result["rows"] = {arm: result["rows"][arm] for arm in options.arms}
    result["less_bfloat16"] = compare(result["rows"])
    result["failures"] = [name for name, row in result["rows"].items() if "error" in row]
    show(result["rows"], rounded(result["less_bfloat16"]))
    harness.publish(result, options.output, ("benchmark", "less_bfloat16", "failures"))


if __name__ == "__main__":
    main()
