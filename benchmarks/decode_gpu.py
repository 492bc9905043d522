"""Claim: on one GPU decoding runs at the memory's speed, at any length of context.

TransNormerLLM in bfloat16 with random weights (speed does not depend on them), vocabulary 64,000.
What takes longest to wait for comes last; each row is written as it is finished, and none begins
after ``--budget`` seconds:

- check: logits of fused steps against the plain ones, before anything is timed. Where kernels that
  overlap differ, all rows run without overlap, and the result says so.
- decode: greedy tokens a second of a whole engine, sampling and bookkeeping included, over --steps
  steps at 1,024 tokens of context and as many at 131,072, which take turns in one engine: its state
  is the same at another position, since its size is. Beside it the time of a step on the device
  alone, and how the two contexts differ from turn to turn.
  Modes: fused (kernels of ``ops.decode``), ring (fused, states written once in 8 tokens), graph
  (PyTorch's kernels in one graph), library (fused, every product cuBLAS'), compiled
  (``torch.compile`` in one graph), int8 and int4 (fused).
- prefill: tokens a second of a prompt of 8,192 tokens, and of as many tokens in ragged prompts of
  one packed call.
- first_token: seconds of the command ``transnormer generate`` up to its first token.
- hf_llama, hf_llama_static: transformers' LLaMA of the same sizes at 1,024 tokens, with its growing
  cache, and with its static one, compiled.
- released: with ``--released DIR``, the authors' code and its cache at 1,024 tokens.

The limit of a step is (weights + rows x state x f) / bandwidth: f = 2, a read and a write; with
rings of 16 each state is written once in 8 tokens, and the entries of its ring are read, 1.2 in
all. The bandwidth is that of a copy in the same run. Writes
benchmarks/results/decode_gpu.json; the last line is JSON.

    python benchmarks/decode_gpu.py --budget 480
    python benchmarks/decode_gpu.py --check
    python benchmarks/decode_gpu.py --models tnl-1b --batches 32 --modes ring
    python benchmarks/decode_gpu.py --device cpu     a dry run at toy sizes: its numbers mean nothing
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from decode_gpu_peers import llama, released
from decode_gpu_rows import (
    BITS,
    MODES,
    build,
    check,
    config_of,
    decode_rows,
    first_token,
    prefill_rows,
)
from gpu_timing import Clock, copy_gb_per_s
from op_gpu import rounded
from subjects import error_text, is_lost

from transnormer.infer.quantize import quantize
from transnormer.models.decoder import Decoder

MODELS = ("tnl-385m", "tnl-1b", "tnl-7b")
CONTEXTS, BATCHES = (1_024, 131_072), (1, 32, 256)
# Parts that are one row for all batches.
WHOLE = ("prefill", "first_token", "hf_llama", "hf_llama_static", "released")
# What runs first: model (None is each), part and batches.
ORDER: tuple[tuple[str | None, str, tuple[int, ...]], ...] = (
    ("tnl-385m", "fused", BATCHES),
    ("tnl-1b", "fused", BATCHES),
    ("tnl-1b", "ring", (256,)),
    ("tnl-7b", "fused", BATCHES),
    ("tnl-7b", "ring", (256,)),
    ("tnl-7b", "int8", (1,)),
    ("tnl-7b", "int4", (1,)),
    ("tnl-385m", "first_token", ()),
    ("tnl-385m", "released", ()),
    ("tnl-385m", "hf_llama", ()),
    ("tnl-7b", "hf_llama", ()),
    ("tnl-385m", "hf_llama_static", ()),
    (None, "prefill", ()),
    ("tnl-1b", "library", (32,)),
    ("tnl-7b", "library", (32,)),
    ("tnl-7b", "hf_llama_static", ()),
    ("tnl-7b", "released", ()),
    ("tnl-385m", "graph", BATCHES),
    ("tnl-385m", "compiled", BATCHES),
    (None, "library", (1, 32)),
    (None, "ring", BATCHES),
    (None, "graph", BATCHES),
    (None, "int8", (1,)),
    (None, "int4", (1,)),
    (None, "first_token", ()),
    (None, "hf_llama", ()),
    (None, "hf_llama_static", ()),
    (None, "released", ()),
    (None, "compiled", BATCHES),
)
# Tokens a second at least, by mode, model and batch; "best" is the better of bfloat16's.
TARGETS: dict[str, dict[str, dict[int, int]]] = {
    "best": {
        "tnl-385m": {1: 1_600, 32: 28_000, 256: 58_000},
        "tnl-1b": {1: 950, 32: 20_000, 256: 48_000},
        "tnl-7b": {1: 170, 32: 4_200, 256: 12_000},
    },
    "ring": {"tnl-1b": {256: 68_000}, "tnl-7b": {256: 17_000}},
}
# Of int8 and int4 against bfloat16 at batch 1.
SPEEDUPS = {"int8": 1.7, "int4": 2.4}
PREFILL_TARGETS = {"tnl-1b": 200_000, "tnl-7b": 33_000}
# Shares, and seconds.
FLATNESS, RAGGED, FIRST_TOKEN = 0.03, 0.10, 15.0
SHORT = ("benchmark", "verdicts", "failures")


def verdicts(found: dict[str, Any]) -> dict[str, Any]:
    """Each target with its value and whether it is met; flatness over contexts in each mode."""
    made: dict[str, Any] = {}
    for name, model in found.items():
        rows = [row for row in model.get("decode", ()) if "tokens_per_second" in row]
        for mode, targets in TARGETS.items():
            for batch, least in targets.get(name, {}).items():
                values = [
                    row["tokens_per_second"]
                    for row in rows
                    if row["batch"] == batch
                    and (row["mode"] == mode or (mode == "best" and row["mode"] not in BITS))
                ]
                if values:
                    key = f"{name} batch {batch} {mode}"
                    made[key] = {"value": max(values), "at_least": least}
                    made[key]["met"] = max(values) >= least
        for row in rows:
            if "beside" in row:
                value = abs(row["beside"]["median"])
                key = f"{name} batch {row['batch']} {row['mode']} contexts"
                made[key] = {"value": value, "at_most": FLATNESS, "met": value <= FLATNESS}
        plain = max(
            (r["tokens_per_second"] for r in rows if alone(r) and r["mode"] not in BITS), default=0
        )
        for row in rows:
            if plain and alone(row) and row["mode"] in BITS and name == "tnl-7b":
                value, least = row["tokens_per_second"] / plain, SPEEDUPS[row["mode"]]
                met = {"value": value, "at_least": least, "met": value >= least}
                made[f"{name} {row['mode']} speedup"] = met
        if "cold" in model.get("first_token", {}):
            value = model["first_token"]["cold"]
            met = {"value": value, "at_most": FIRST_TOKEN, "met": value <= FIRST_TOKEN}
            made[f"{name} first token"] = met
        prefill = model.get("prefill", {})
        if "dense_tokens_per_second" in prefill:
            dense, ragged = (prefill[f"{x}_tokens_per_second"] for x in ("dense", "ragged"))
            value = 1.0 - ragged / dense
            made[f"{name} ragged"] = {"value": value, "at_most": RAGGED, "met": value <= RAGGED}
            if name in PREFILL_TARGETS:
                least = PREFILL_TARGETS[name]
                met = dense >= least
                made[f"{name} prefill"] = {"value": dense, "at_least": least, "met": met}
    return made


def alone(row: dict[str, Any]) -> bool:
    """Whether a row is of batch 1 at the short context."""
    return row["batch"] == 1 and row["context"] == CONTEXTS[0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--modes", nargs="+", choices=[*MODES, *WHOLE], default=[*MODES, *WHOLE])
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--released", type=Path, metavar="DIR", help="the released code's folder")
    parser.add_argument("--check", action="store_true", help="compare fused steps, time nothing")
    parser.add_argument("--budget", type=float, default=1e9, help="begin no row after so many s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "decode_gpu.json")
    return parser.parse_args()


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Model, part and batch of what was asked for, each once, in their order."""
    seen: set[tuple[str, str, int]] = set()
    for only, part, batches in ORDER:
        if part not in options.modes or (part == "released" and options.released is None):
            continue
        for name in [only] if only else options.models:
            for batch in [0] if part in WHOLE else batches:
                cell = (str(name), part, batch)
                asked = part in WHOLE or batch in options.batches
                if asked and name in options.models and cell not in seen:
                    seen.add(cell)
                    yield cell


class Bench:
    """A run: its options and clock, the model at hand, and what was found so far.

    Args:
        options: of the command line.
        clock: of the device.
        result: written after every row.
    """

    def __init__(self, options: argparse.Namespace, clock: Clock, result: dict[str, Any]) -> None:
        self.options, self.clock, self.result = options, clock, result
        self._name = self._changed = ""
        self._model: Decoder | None = None

    def model(self, name: str, mode: str) -> Decoder:
        """A model as a mode changes it in place, made anew where another one is at hand."""
        changed = mode if mode in BITS or mode == "compiled" else ""
        if self._model is not None and (self._name, self._changed) == (name, changed):
            return self._model
        self.drop()
        model = self._model = build(config_of(name, self.clock.dry), self.options.device)
        self._name, self._changed = name, changed
        if mode in BITS:
            quantize(model, 8 if mode == "int8" else 4, group_size=32 if self.clock.dry else 128)
        return model

    def forget(self) -> None:
        """Forget the model at hand; its memory stays with the allocator."""
        self._model = None

    def drop(self) -> None:
        """Forget the model at hand and give its memory back."""
        self.forget()
        self.clock.free()

    def run(self, name: str, part: str, batch: int) -> None:
        """One cell, into the result."""
        found = self.result["models"].setdefault(name, {"decode": []})
        options, clock = self.options, self.clock
        few = [size for size in options.batches if size <= 32]
        config = config_of(name, clock.dry)
        made: Any
        if part in WHOLE:
            if part.startswith("hf_llama"):
                self.drop()
                static = part == "hf_llama_static"
                made = llama(config, few[:1] if static else few, clock, static=static)
            elif part == "released":
                self.drop()
                made = released(options.released, config, few, clock)
            elif part == "first_token":
                made = first_token(self.model(name, part), options.device)
            else:
                made = prefill_rows(self.model(name, part), clock)
            found[part] = made
        else:
            model, rate = self.model(name, part), self.result["copy_gb_per_s"]
            made = decode_rows(model, part, options.contexts, batch, options.steps, rate, clock)
            found["decode"] += made
        clock.free()
        for row in made if isinstance(made, list) else [made]:
            print(f"{name} {part} {json.dumps(rounded(row))}", flush=True)

    def write(self) -> None:
        """What was found so far."""
        self.result["verdicts"] = verdicts(self.result["models"])
        output: Path = self.options.output
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(harness.finite(self.result), indent=1)
        output.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    options = parse()
    began = time.monotonic()
    clock = Clock(options.device)
    result: dict[str, Any] = {
        "benchmark": "decode_gpu",
        "environment": harness.gpu_environment(options.commit),
        "copy_gb_per_s": copy_gb_per_s(clock),
        "steps": options.steps,
        "check": check(clock, options.modes),
        "models": {},
        "left_out": [],
        "verdicts": {},
        "failures": [],
    }
    print(f"check {json.dumps(result['check'])}", flush=True)
    if clock.dry:
        result["dry_run"] = "toy sizes on a CPU; the numbers mean nothing"
    if not result["check"]["right"]:
        result["failures"].append("fused steps differ from plain ones")
    wrong = [mode for mode, right in result["check"]["bits_right"].items() if not right]
    result["failures"] += [f"fused steps of {mode} differ from plain ones" for mode in wrong]
    bench, lost = Bench(options, clock, result), False
    for cell in cells(options) if not options.check else ():
        if lost or time.monotonic() - began > options.budget:
            result["left_out"].append(" ".join(map(str, cell)))
            continue
        try:
            bench.run(*cell)
        except Exception as error:
            result["failures"].append(f"{' '.join(map(str, cell))}: {error_text(error)}")
            lost = is_lost(error)
            bench.forget()
        bench.write()
    result["seconds"] = time.monotonic() - began
    harness.publish(result, options.output, SHORT)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
