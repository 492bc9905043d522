"""Claim: what a recipe reaches on this machine: held-out bits per byte, time and tokens per second.

Trains the recipe in a run directory of its own, with the recipe's own evaluation on all of the
held-out text before and after. Prints a table; the last line is JSON, which also goes to
benchmarks/results/train_NAME.json, NAME being the recipe's.
"""

import argparse
from pathlib import Path
from typing import Any

import harness
import torch

from transnormer import load
from transnormer.eval.perplexity import score_texts
from transnormer.train import (
    EvaluationReport,
    HeldoutReport,
    StepReport,
    read_run,
    run_training,
)


class Lines:
    """Progress as lines: every message and evaluation, and one step in a hundred."""

    def message(self, text: str) -> None:
        print(text, flush=True)

    def step(self, report: StepReport, steps: int) -> None:
        if report.step % 100 == 0:
            print(
                f"step {report.step}/{steps}  {report.tokens_per_second:,.0f} tokens/s", flush=True
            )

    def evaluation(self, report: HeldoutReport) -> None:
        print(f"step {report.step}  held-out {report.describe()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    facts = harness.environment()
    # The text may lie anywhere; a figure must not name a place on one machine.
    facts["command"] = f"python benchmarks/train_cpu.py {arguments.recipe}"
    config = read_run(arguments.recipe, [*arguments.overrides, "train.eval_bytes=0"])
    done = run_training(config, evaluate=score_texts, progress=Lines())
    assert isinstance(done.first, EvaluationReport)
    assert isinstance(done.last, EvaluationReport)
    parameters = load(done.run_dir).num_parameters()
    result: dict[str, Any] = {
        "benchmark": "train_cpu",
        "environment": facts | {"threads": torch.get_num_threads()},
        "recipe": arguments.recipe.name,
        "text": [Path(path).name for path in config.data.paths],
        "parameters": parameters,
        "steps": done.step,
        "tokens": done.step * config.train.tokens_per_step,
        "minutes": done.seconds / 60,
        "tokens_per_second": done.step * config.train.tokens_per_step / done.seconds,
        "heldout_bytes": done.last.bytes,
        "bits_per_byte_before": done.first.bits_per_byte,
        "bits_per_byte_after": done.last.bits_per_byte,
        "nats_per_token_after": done.last.loss,
    }
    keys = ("parameters", "steps", "minutes", "bits_per_byte_before", "bits_per_byte_after")
    harness.print_table(keys, [[f"{result[key]:,.4g}" for key in keys]])
    name = arguments.recipe.stem
    harness.publish(result, arguments.output or harness.RESULTS / f"train_{name}.json")


if __name__ == "__main__":
    main()
