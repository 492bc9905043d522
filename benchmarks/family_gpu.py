"""Claim: what each model of the family reaches on the same tokens, and how fast it trains, on a GPU.

Two measurements of every recipe given:

- ``--train``: trains it with each seed by the ordinary trainer, several at once where there are
  several GPUs, then scores the held-out part in windows of data.seq tokens, each from an empty
  state (so that no model reads further than it was trained to), in bits per byte.
- ``--speed``: forward, backward and optimizer step at the same tokens a step in rows of 2,048 and
  of 32,768 tokens, one model at a time on the first GPU, with the parameters and FLOPs of the cost
  model beside.

Writes benchmarks/results/family_gpu.json, and the table of docs/models.md as .md beside it; one
measurement keeps what the file has of the other. The last line is JSON.

    python benchmarks/family_gpu.py recipes/small_*.toml --data PATH --train --speed
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import harness
import torch

from transnormer import load
from transnormer.data import Loader, TokenSource, label_bytes, open_tokenized, token_lengths
from transnormer.models import zoo
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.nn.token_mixers import CosformerConfig
from transnormer.optim import build_optimizer
from transnormer.train import read_run, run_training
from transnormer.train.metrics import METRICS, read_records
from transnormer.train.recipe import RunConfig

SPEED_LENGTHS = (2_048, 32_768)
SPEED_TOKENS = 32_768
EVALUATION_ROWS = 32
BASELINE = "small_llama"


def heldout_score(model: Decoder, data: Path, seq: int) -> dict[str, float]:
    """Bits per byte of the held-out part in windows of seq tokens, each from an empty state."""
    tokenizer = open_tokenized(data).tokenizer
    source = TokenSource(data / "heldout")
    loader = Loader([(source, 1.0)], seq=seq, batch=EVALUATION_ROWS, seed=0)
    lengths = token_lengths(tokenizer)
    device = next(model.parameters()).device
    nats, tokens, text_bytes = 0.0, 0, 0
    for step in range(loader.windows[0] // EVALUATION_ROWS):
        batch = loader.batch(step)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            ids, labels = batch.input_ids.to(device), batch.labels.to(device)
            nats += model.loss(ids, labels, reduction="sum").item()
        tokens += int((batch.labels >= 0).sum())
        text_bytes += label_bytes(batch, lengths, tokenizer)
    return {
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "nats_per_token": nats / tokens,
        "tokens": tokens,
        "bytes": text_bytes,
    }


def _data_keys(data: Path) -> list[str]:
    """Overrides that name a folder of token shards and the tokenizer that made them."""
    return [
        f"data.path={json.dumps(str(data))}",
        f"data.tokenizer={json.dumps(str(data / 'tokenizer'))}",
    ]


def train_one(recipe: Path, seed: int, data: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one recipe with one seed in a directory of its own; what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        given = [*_data_keys(data), f"train.seed={seed}"]
        given += [f"output.dir={json.dumps(folder + '/run')}", "train.save_every=0", *overrides]
        config = read_run(recipe, given)
        done = run_training(config)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(done.run_dir, device=device)
        rows = read_records(done.run_dir / METRICS)
    every = max(len(rows) // 20, 1)
    return {
        "recipe": recipe.stem,
        "seed": seed,
        "steps": done.step,
        "tokens": done.step * config.train.tokens_per_step,
        "seconds": round(done.seconds, 1),
        "curve": [[row["step"], round(row["loss"], 4)] for row in rows[::every]],
        "heldout": heldout_score(model, data, config.data.seq),
    }


def train_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every recipe with every seed, as processes of their own spread over the GPUs."""
    slots = max(torch.cuda.device_count(), 1) * arguments.per_gpu
    waiting = [(recipe, seed) for seed in arguments.seeds for recipe in arguments.recipes]
    running: dict[int, tuple[subprocess.Popen[str], Path, str]] = {}
    found: list[dict[str, Any]] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            spent = time.monotonic() - started
            for slot in set(range(slots)) - set(running):
                if not waiting or spent > arguments.budget:
                    break
                recipe, seed = waiting.pop(0)
                output = Path(folder) / f"{recipe.stem}-{seed}.json"
                command = [sys.executable, __file__, str(recipe), "--data", str(arguments.data)]
                command += ["--seeds", str(seed), "--worker", str(output)]
                for override in arguments.overrides:
                    command += ["--set", override]
                gpu = str(slot % max(torch.cuda.device_count(), 1))
                log = output.with_suffix(".log").open("w")
                child = subprocess.Popen(
                    [*command, "--gpu", gpu], stdout=log, stderr=subprocess.STDOUT, text=True
                )
                running[slot] = (child, output, f"{recipe.stem} seed {seed}")
            if spent > arguments.budget and not running:
                found += [
                    {"recipe": recipe.stem, "seed": seed, "left_out": "the seconds were spent"}
                    for recipe, seed in waiting
                ]
                break
            for slot, (child, output, name) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[slot]
                if output.is_file():
                    result = json.loads(output.read_text(encoding="utf-8"))
                    score = result["heldout"]["bits_per_byte"]
                    print(f"{name}: {score:.4f} in {result['seconds']} s", flush=True)
                else:
                    recipe_name, _, seed_text = name.partition(" seed ")
                    tail = output.with_suffix(".log").read_text(encoding="utf-8")[-600:]
                    result = {"recipe": recipe_name, "seed": int(seed_text), "error": tail}
                    print(f"{name} failed: {tail}", flush=True)
                found.append(result)
                publish(arguments, {"training": found})
            time.sleep(0.2)
    return found


def step_seconds(config: RunConfig, model: Decoder, rows: int, seq: int) -> dict[str, Any]:
    """Median seconds of a training step on random tokens, and the peak of memory."""
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, config.optimizer)
    ids = torch.randint(model.config.vocab_size, (rows, seq), device=device)
    times: list[float] = []
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i in range(12):
        synchronize()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        times.append(time.perf_counter() - start)
        if i >= 2 and sum(times) > 8.0:
            break
    counted = times[2:] or times[-1:]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    return {
        "rows": rows,
        "seq": seq,
        "ms": 1e3 * statistics.median(counted),
        "tokens_per_second": rows * seq / statistics.median(counted),
        "steps_timed": len(counted),
        "peak_mb": peak,
    }


def reaching(config: DecoderConfig, seq: int) -> DecoderConfig:
    """The model with room for seq tokens, where its mixers have an end; its costs stay the same."""
    blocks = []
    for block in config.blocks:
        mixer = block.token_mixer
        if isinstance(mixer, CosformerConfig) and mixer.max_positions < seq:
            mixer = mixer.model_copy(update={"max_positions": seq})
        blocks.append(block.model_copy(update={"token_mixer": mixer}))
    return config.model_copy(update={"blocks": tuple(blocks)})


def speed_of(recipe: Path, data: Path, overrides: list[str]) -> dict[str, Any]:
    """Training steps of one recipe's model at each length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = read_run(recipe, [*_data_keys(data), *overrides])
    vocab_size = open_tokenized(data).tokenizer.vocab_size
    result: dict[str, Any] = {"recipe": recipe.stem, "lengths": []}
    for seq in SPEED_LENGTHS:
        try:
            torch.manual_seed(0)
            sizes = config.model.build(vocab_size, pad=None, bos=None, eos=None)
            with torch.device(device):
                model = Decoder(reaching(sizes, seq))
            entry = step_seconds(config, model.train(), SPEED_TOKENS // seq, seq)
        except (RuntimeError, ValueError) as error:
            entry = {"seq": seq, "error": str(error).splitlines()[0][:300]}
        result["lengths"].append(entry)
        print(recipe.stem, {k: v for k, v in entry.items() if k != "rows"}, flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return result


def table(result: dict[str, Any], recipes: list[Path]) -> str:
    """What was measured, as Markdown: one row a recipe; averages over the seeds."""
    scores: dict[str, list[float]] = {}
    for run in result.get("training", {}).get("runs", []):
        if "heldout" in run:
            scores.setdefault(run["recipe"], []).append(run["heldout"]["bits_per_byte"])
    means = {name: statistics.mean(values) for name, values in scores.items()}
    speeds = {
        run["recipe"]: {entry["seq"]: entry for entry in run["lengths"]}
        for run in result.get("speed", {}).get("runs", [])
    }
    baseline = means.get(BASELINE)
    lines = [
        "| model | parameters (M), beside the embedding | state at 1,024 / 32,768 tokens (kB) | "
        "GFLOP a token in training at 1,024 | tokens/s at 2,048 | at 32,768 | "
        "held-out bits per byte | seeds | of LLaMA |",
        "|---" * 9 + "|",
    ]
    for recipe in recipes:
        name = recipe.stem
        config = tomllib.loads(recipe.read_text(encoding="utf-8"))["model"]["name"]
        cost = ModelCost.of(zoo.get(config))
        states = [cost.state_bytes(context) / 1e3 for context in (1024, 32_768)]
        cells = [
            config.removeprefix("small-"),
            f"{cost.parameters / 1e6:.1f}, {cost.without_embeddings / 1e6:.1f}",
            " / ".join(f"{state:,.0f}" for state in states),
            f"{3 * cost.flops(512).total / 1e9:.3f}",
        ]
        for seq in SPEED_LENGTHS:
            entry = speeds.get(name, {}).get(seq, {})
            rate = entry.get("tokens_per_second")
            cells.append(f"{rate:,.0f}" if rate else str(entry.get("error", "-"))[:18])
        mean = means.get(name)
        spread = ", ".join(f"{score:.4f}" for score in scores.get(name, []))
        cells += [f"{mean:.4f}" if mean else "-", spread or "-"]
        cells.append(f"{mean / baseline:.3f}" if mean and baseline else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def publish(arguments: argparse.Namespace, measured: dict[str, Any]) -> dict[str, Any]:
    """Write what was measured over what the file holds of the other measurements."""
    before: dict[str, Any] = {"benchmark": "family_gpu"}
    if arguments.output.is_file():
        before = json.loads(arguments.output.read_text(encoding="utf-8"))
    # The data may lie anywhere; a figure must not name a place on one machine.
    command = "python benchmarks/family_gpu.py recipes/small_*.toml --data PATH"
    for key, value in measured.items():
        flag = {"speed": "--speed", "training": f"--train --per-gpu {arguments.per_gpu}"}[key]
        facts = harness.gpu_environment(arguments.commit) | {"command": f"{command} {flag}"}
        # Of the last measurement; the other may be of another day.
        before["environment"] = facts
        before[key] = {"environment": facts, "gpus": torch.cuda.device_count(), "runs": value}
    text = json.dumps(harness.finite(before), indent=1) + "\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")
    written = table(before, sorted(arguments.recipes))
    arguments.output.with_suffix(".md").write_text(written, encoding="utf-8")
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="a folder of token shards")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--per-gpu", type=int, default=1, help="runs side by side on one GPU")
    parser.add_argument("--budget", type=float, default=1e9, help="start no run after so many s")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--commit")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gpu", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "family_gpu.json")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(arguments.gpu)
    if arguments.worker:
        result = train_one(
            arguments.recipes[0], arguments.seeds[0], arguments.data, arguments.overrides
        )
        arguments.worker.write_text(json.dumps(harness.finite(result)), encoding="utf-8")
        return
    found: dict[str, Any] = {}
    if arguments.speed:
        found["speed"] = [
            speed_of(recipe, arguments.data, arguments.overrides) for recipe in arguments.recipes
        ]
        publish(arguments, found)
    if arguments.train:
        found["training"] = train_all(arguments)
        publish(arguments, {"training": found["training"]})
    print(json.dumps({"benchmark": "family_gpu", "measured": sorted(found)}))


if __name__ == "__main__":
    main()
