"""Claim: on one GPU decoding runs at the memory's speed, at any length of context.

TransNormerLLM in bfloat16 with random weights (speed does not depend on them), vocabulary 64,000:

- decode: greedy tokens a second of a whole engine, sampling and bookkeeping included, over --steps
  steps at 1,024 and at 131,072 tokens of context, with the states written each step and with rings.
  All rows go on from one context, read once: a step costs the same whatever the tokens are.
- prefill: tokens a second of a prompt of 8,192 tokens, and of as many tokens in ragged prompts of
  one packed call.
- hf_llama: transformers' LLaMA of the same sizes beside it, a step of its cache at 1,024 tokens.

The limit of a step is (weights + rows x state x f) / bandwidth: f = 2, a read and a write; with
rings of 16 each state is written once in 8 tokens, and the entries of its ring are read, 1.2 in
all. The bandwidth is that of a copy in the same run. Writes
benchmarks/results/decode_gpu.json; the last line is JSON.

    python benchmarks/decode_gpu.py
    python benchmarks/decode_gpu.py --models tnl-1b --batches 32 --contexts 1024 --modes ring
    python benchmarks/decode_gpu.py --device cpu     a dry run at toy sizes: its numbers mean nothing
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from gpu_timing import Clock, copy_gb_per_s
from op_gpu import rounded
from subjects import error_text, is_lost
from torch import Tensor

from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.pool import make_pool
from transnormer.infer.reading import read
from transnormer.infer.sampling import SamplingConfig
from transnormer.models import zoo
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.state import DecoderState

MODELS = ("tnl-385m", "tnl-1b", "tnl-7b")
CONTEXTS, BATCHES = (1_024, 131_072), (1, 32, 256)
MODES = {"plain": {}, "ring": {"ring": 16}}
# Traffic of a state in a step, in its own sizes.
FACTORS = {"plain": 2.0, "ring": 1.2}
VOCAB, PIECE, WARMUP = 64_000, 8_192, 8
# Tokens a second at least, by mode (None is the better of both), model and batch.
TARGETS: dict[str, dict[str, dict[int, int]]] = {
    "best": {
        "tnl-385m": {1: 1_600, 32: 28_000, 256: 58_000},
        "tnl-1b": {1: 950, 32: 20_000, 256: 48_000},
        "tnl-7b": {1: 170, 32: 4_200, 256: 12_000},
    },
    "ring": {"tnl-1b": {256: 68_000}, "tnl-7b": {256: 17_000}},
}
PREFILL_TARGETS = {"tnl-1b": 200_000, "tnl-7b": 33_000}
FLATNESS, RAGGED = 0.03, 0.10
SHORT = ("benchmark", "verdicts", "failures")


def config_of(name: str, toy: bool) -> DecoderConfig:
    """A published size, or the same kind of model in toy size."""
    if not toy:
        return zoo.get(name, vocab_size=VOCAB)
    return zoo.tnl_custom(vocab_size=512, model_dim=64, num_layers=2, heads=2, glu_dim=96)


def build(config: DecoderConfig, device: str) -> Decoder:
    """The model in bfloat16, made where it runs."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    model.reset_parameters()
    return model


def random_ids(config: DecoderConfig, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (count,), generator=generator)


def decode(
    model: Decoder, state: DecoderState, batch: int, steps: int, clock: Clock, **mode: Any
) -> dict[str, float]:
    """Tokens a second of an engine with ``batch`` greedy rows that all go on from one state."""
    config = EngineConfig(slots=batch, prefill_tokens=max(batch, 64), **mode)
    engine = Engine(model, config)
    greedy = SamplingConfig(temperature=0.0)
    for row in range(batch):
        first = [1 + row % 100]
        engine.submit(
            first, max_new_tokens=WARMUP + steps + 1, sampling=greedy, stop=[], state=state
        )
    _, first = clock.first(engine.step)
    for _ in range(WARMUP):
        engine.step()
    clock.wait()
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    clock.wait()
    took = time.perf_counter() - began
    assert engine.running in (0, batch)
    return {
        "tokens_per_second": batch * steps / took,
        "ms_per_step": 1e3 * took / steps,
        "first_step_s": first,
        "pool_bytes": engine.pool.nbytes,
    }


def decode_rows(
    name: str, model: Decoder, options: argparse.Namespace, clock: Clock, gb_per_s: float
) -> list[dict[str, Any]]:
    """All rows of one model; a failure costs its own row."""
    cost, rows = ModelCost.of(model.config), []
    for context in options.contexts:
        ids = random_ids(model.config, context if not clock.dry else context // 64)
        _, state = read(model, ids[None].split(PIECE, 1))
        for batch in options.batches:
            for mode in options.modes:
                row: dict[str, Any] = {"context": context, "batch": batch, "mode": mode}
                moved = cost.weight_bytes + batch * FACTORS[mode] * cost.constant_state_bytes
                limit = batch * gb_per_s * 1e9 / moved
                settings = MODES[mode] | {"compile": options.compile}
                try:
                    row |= decode(model, state, batch, options.steps, clock, **settings)
                    row |= {"limit": limit, "share_of_limit": row["tokens_per_second"] / limit}
                except Exception as error:
                    row["error"] = error_text(error)
                    if is_lost(error):
                        raise
                clock.free()
                rows.append(row)
                print(f"{name} {json.dumps(rounded(row))}", flush=True)
    return rows


def prefill_rows(model: Decoder, clock: Clock) -> dict[str, float]:
    """Tokens a second of one prompt of PIECE tokens and of ragged prompts of as many."""
    tokens = PIECE if not clock.dry else 128
    ids = random_ids(model.config, tokens)
    pool = make_pool(model, 16)
    # Sixteen lengths from an eighth of the mean upwards, which add up to the tokens.
    weights = torch.linspace(0.125, 1.875, 16)
    ends = (weights.cumsum(0) / weights.sum() * tokens).round().long().tolist()
    pieces = [ids[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def median(call: Callable[[], object]) -> float:
        return tokens / (clock.time(call).ms / 1e3)

    return {
        "tokens": tokens,
        "dense_tokens_per_second": median(lambda: pool.prefill([ids], [0])),
        "ragged_tokens_per_second": median(lambda: pool.prefill(pieces, list(range(16)))),
    }


def hugging_face_llama(config: DecoderConfig, options: argparse.Namespace, clock: Clock) -> Any:
    """A greedy step of transformers' LLaMA of the same sizes after 1,024 tokens, its own cache."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    block = config.blocks[-1]
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": getattr(block.channel_mixer, "hidden_dim", 4 * config.model_dim),
        "num_hidden_layers": len(config.blocks),
        "num_attention_heads": getattr(block.token_mixer, "heads", 8),
        "attn_implementation": "sdpa",
    }
    with torch.device(options.device):
        made: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model = made.to(torch.bfloat16).eval()
    context, steps, rows = (1_024, options.steps, []) if not clock.dry else (16, 2, [])
    for batch in options.batches:
        try:
            ids = random_ids(config, context).expand(batch, -1).to(options.device)
            with torch.inference_mode():
                cache = DynamicCache()
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                times = []
                for _ in range(WARMUP + steps):
                    began = time.perf_counter()
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(token, past_key_values=cache, use_cache=True)
                    clock.wait()
                    times.append(time.perf_counter() - began)
            median = sorted(times[WARMUP:])[steps // 2]
            rows.append({"batch": batch, "tokens_per_second": batch / median})
        except Exception as error:
            rows.append({"batch": batch, "error": error_text(error)})
            if is_lost(error):
                raise
        clock.free()
    return rows


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
                    if row["batch"] == batch and mode in ("best", row["mode"])
                ]
                if values:
                    key = f"{name} batch {batch} {mode}"
                    made[key] = {"value": max(values), "at_least": least}
                    made[key]["met"] = max(values) >= least
        speeds: dict[tuple[int, str], list[float]] = {}
        for row in rows:
            speeds.setdefault((row["batch"], row["mode"]), []).append(row["tokens_per_second"])
        for (batch, mode), values in speeds.items():
            if len(values) > 1:
                value = max(values) / min(values) - 1.0
                key = f"{name} batch {batch} {mode} contexts"
                made[key] = {"value": value, "at_most": FLATNESS, "met": value <= FLATNESS}
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--compile", action="store_true", help="compile the blocks for decoding")
    parser.add_argument("--peers", action="store_true", help="transformers' LLaMA beside")
    parser.add_argument("--budget", type=float, default=1e9, help="start no model after so many s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "decode_gpu.json")
    return parser.parse_args()


def run_model(
    name: str, options: argparse.Namespace, clock: Clock, gb_per_s: float
) -> dict[str, Any]:
    """Everything of one model."""
    config = config_of(name, clock.dry)
    model = build(config, options.device)
    found: dict[str, Any] = {"parameters": model.num_parameters()}
    found["prefill"] = prefill_rows(model, clock)
    print(f"{name} prefill {json.dumps(rounded(found['prefill']))}", flush=True)
    found["decode"] = decode_rows(name, model, options, clock, gb_per_s)
    del model
    clock.free()
    if options.peers:
        found["hf_llama"] = hugging_face_llama(config, options, clock)
        print(f"{name} hf_llama {json.dumps(rounded(found['hf_llama']))}", flush=True)
    return found


def main() -> int:
    options = parse()
    began = time.monotonic()
    clock = Clock(options.device)
    result: dict[str, Any] = {
        "benchmark": "decode_gpu",
        "environment": harness.gpu_environment(options.commit),
        "copy_gb_per_s": copy_gb_per_s(clock),
        "steps": options.steps,
        "compiled": options.compile,
        "models": {},
        "failures": [],
    }
    if clock.dry:
        result["dry_run"] = "toy sizes on a CPU; the numbers mean nothing"
    for name in options.models:
        if time.monotonic() - began > options.budget:
            result["models"][name] = {"left_out": "the seconds were spent"}
            continue
        try:
            result["models"][name] = run_model(name, options, clock, result["copy_gb_per_s"])
        except Exception as error:
            result["models"][name] = {"error": error_text(error)}
            result["failures"].append(f"{name}: {error_text(error)}")
            if is_lost(error):
                break
        result["verdicts"] = verdicts(result["models"])
        harness.publish(result, options.output, SHORT)
    harness.publish(result, options.output, SHORT)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
