"""Claim: on one GPU decoding runs at the memory's speed, at any length of context.

TransNormerLLM in bfloat16 with random weights (speed does not depend on them), vocabulary 64,000.
What takes longest to wait for comes last; each row is written as it is finished, and none begins
after ``--budget`` seconds:

- check: logits of fused steps against the plain ones, before anything is timed. Where kernels that
  overlap differ, all rows run without overlap, and the result says so.
- decode: greedy tokens a second of a whole engine, sampling and bookkeeping included, over --steps
  steps at 1,024 tokens of context and at 131,072. Beside it the time of a step on the device alone.
  All rows go on from one state; that of the longer context is the same at another position, since
  its size is, so a step costs the same whatever the tokens were.
  Modes: fused (kernels of ``ops.decode``), ring (fused, states written once in 8 tokens), graph
  (PyTorch's kernels in one graph), library (fused, every product cuBLAS'), compiled (``torch.compile`` in one graph), int8 and int4 (fused).
- prefill: tokens a second of a prompt of 8,192 tokens, and of as many tokens in ragged prompts of
  one packed call.
- hf_llama: transformers' LLaMA of the same sizes beside it, a step of its cache at 1,024 tokens.

The limit of a step is (weights + rows x state x f) / bandwidth: f = 2, a read and a write; with
rings of 16 each state is written once in 8 tokens, and the entries of its ring are read, 1.2 in
all. The bandwidth is that of a copy in the same run. Writes
benchmarks/results/decode_gpu.json; the last line is JSON.

    python benchmarks/decode_gpu.py --budget 480
    python benchmarks/decode_gpu.py --check
    python benchmarks/decode_gpu.py --models tnl-1b --batches 32 --contexts 1024 --modes ring
    python benchmarks/decode_gpu.py --device cpu     a dry run at toy sizes: its numbers mean nothing
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import harness
import torch
from gpu_timing import Clock, copy_gb_per_s
from op_gpu import rounded
from subjects import error_text, is_lost
from torch import Tensor, nn

from transnormer.infer import fused
from transnormer.infer.engine import Engine
from transnormer.infer.engine_config import EngineConfig
from transnormer.infer.pool import FixedPool, make_pool
from transnormer.infer.quantize import quantize
from transnormer.infer.reading import read
from transnormer.infer.sampling import SamplingConfig
from transnormer.models import zoo
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.state import DecoderState

MODELS = ("tnl-385m", "tnl-1b", "tnl-7b")
CONTEXTS, BATCHES = (1_024, 131_072), (1, 32, 256)
MODES: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "ring": {"fused": True, "ring": 16},
    "library": {"fused": True},
    "graph": {},
    "compiled": {"compile": True},
    "int8": {"fused": True},
    "int4": {"fused": True},
}
BITS = {"int8": 8, "int4": 4}
# Traffic of a state in a step, in its own sizes.
STATE_TRAFFIC = {"ring": 1.2}
ROWS = fused.ROWS
VOCAB, PIECE, READ, WARMUP = 64_000, 8_192, 1_024, 8
# What runs first: model (None is each), part, contexts and batches.
ORDER: tuple[tuple[str | None, str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("tnl-385m", "fused", (1_024,), BATCHES),
    ("tnl-1b", "fused", (1_024,), BATCHES),
    ("tnl-7b", "fused", (1_024,), BATCHES),
    ("tnl-1b", "ring", (1_024,), (256,)),
    ("tnl-7b", "ring", (1_024,), (256,)),
    (None, "prefill", (), ()),
    (None, "fused", (131_072,), BATCHES),
    ("tnl-7b", "int8", (1_024,), (1,)),
    ("tnl-7b", "int4", (1_024,), (1,)),
    ("tnl-385m", "library", (1_024,), (1, 32)),
    ("tnl-7b", "library", (1_024,), (1, 32)),
    ("tnl-385m", "graph", (1_024,), BATCHES),
    ("tnl-385m", "compiled", (1_024,), BATCHES),
    (None, "hf_llama", (), BATCHES),
    (None, "ring", CONTEXTS, BATCHES),
    (None, "graph", CONTEXTS, BATCHES),
    (None, "int8", CONTEXTS, (1,)),
    (None, "int4", CONTEXTS, (1,)),
    (None, "compiled", CONTEXTS, BATCHES),
)
CHECK_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.03}
# Tokens a second at least, by mode (None is the better of both), model and batch.
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


def check_one(dtype: torch.dtype, rows: int, ring: int | None, clock: Clock) -> float:
    """Largest relative error of fused logits over ten steps beside the plain ones."""
    config = zoo.tnl_custom(vocab_size=512, model_dim=1024, num_layers=4, heads=8, glu_dim=2816)
    if clock.dry:
        config = config_of("", toy=True)
    torch.manual_seed(0)
    model = Decoder(config.model_copy(update={"init_std": 0.04})).to(clock.device, dtype).eval()
    # Without a GPU only the interpreter runs kernels: the plain step is compared with itself.
    pools = [make_pool(model, rows, fused=x and not clock.dry, ring=ring) for x in (False, True)]
    worst = 0.0
    for _ in range(10):
        ids = torch.randint(config.vocab_size, (rows, 1))
        plain, made = (pool.decode(ids, range(rows), rows).double() for pool in pools)
        worst = max(worst, float((made - plain).norm() / plain.norm()))
    return worst


def check(clock: Clock) -> dict[str, Any]:
    """Errors of fused steps; sets ``fused.OVERLAP`` to what is right, and says whether one is."""
    found: dict[str, Any] = {}
    for overlap in (True, False):
        fused.OVERLAP = overlap
        errors, right = {}, True
        for dtype, limit in CHECK_LIMITS.items():
            for rows, ring in ((1, None), (3, None), (32, None), (100, None), (3, 16)):
                name = f"{str(dtype).removeprefix('torch.')} rows {rows} ring {ring}"
                errors[name] = check_one(dtype, rows, ring, clock)
                right &= errors[name] <= limit
        found["overlapping" if overlap else "apart"] = errors
        if right:
            break
    return {"right": right, "overlap": fused.OVERLAP, **found}


def decode(
    model: Decoder, state: DecoderState, batch: int, steps: int, clock: Clock, **mode: Any
) -> dict[str, float]:
    """Tokens a second of an engine with ``batch`` greedy rows that all go on from one state."""
    # Prompts one by one: together their states would be in memory three times.
    config = EngineConfig(slots=batch, prefill_tokens=batch, batch_invariant=True, **mode)
    engine = Engine(model, config)
    greedy = SamplingConfig(temperature=0.0)
    for row in range(batch):
        prompt = [1 + row % 100]
        engine.submit(
            prompt, max_new_tokens=WARMUP + steps + 2, sampling=greedy, stop=[], state=state
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
    assert engine.running == batch
    row = {
        "tokens_per_second": batch * steps / took,
        "ms_per_step": 1e3 * took / steps,
        "first_step_s": first,
        "pool_bytes": engine.pool.nbytes,
    }
    if not clock.dry:
        assert isinstance(engine.pool, FixedPool)
        again, pool = min(steps, 50), engine.pool
        _, took = clock.first(lambda: [pool.step.again(batch, 1) for _ in range(again)])
        row["device_ms_per_step"] = 1e3 * took / again
    return row


def weight_bytes(cost: ModelCost, model: Decoder, mode: str) -> float:
    """Bytes of weights that a step reads."""
    if mode not in BITS:
        return cost.weight_bytes
    parts = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    whole = sum(m.in_features * m.out_features for m in parts)
    return cost.weight_bytes - whole * (2.0 - BITS[mode] / 8)


def decode_row(
    model: Decoder, mode: str, context: int, batch: int, bench: "Bench"
) -> dict[str, Any]:
    """One row; a failure costs its own row."""
    options, clock = bench.options, bench.clock
    cost = ModelCost.of(model.config)
    row: dict[str, Any] = {"context": context, "batch": batch, "mode": mode}
    traffic = batch * STATE_TRAFFIC.get(mode, 2.0) * cost.constant_state_bytes
    limit = batch * bench.gb_per_s * 1e9 / (weight_bytes(cost, model, mode) + traffic)
    settings = MODES[mode] if not clock.dry else {"ring": MODES[mode].get("ring")}
    # No rows: the products of all are left to the model's modules.
    fused.ROWS = 0 if mode == "library" else ROWS
    try:
        ids = random_ids(model.config, READ if not clock.dry else 16)
        _, state = read(model, ids[None].split(PIECE, 1))
        state = state._replace(positions=torch.full_like(state.positions, context))
        row |= decode(model, state, batch, options.steps, clock, **settings)
        row |= {"limit": limit, "share_of_limit": row["tokens_per_second"] / limit}
    except Exception as error:
        row["error"] = error_text(error)
        if is_lost(error):
            raise
    clock.free()
    return row


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


def hugging_face_llama(config: DecoderConfig, batches: Sequence[int], bench: "Bench") -> Any:
    """A greedy step of transformers' LLaMA of the same sizes after 1,024 tokens, its own cache."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    options, clock = bench.options, bench.clock
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
    context, steps, rows = (1_024, 32, []) if not clock.dry else (16, 2, [])
    for batch in batches:
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
                    if row["batch"] == batch
                    and (row["mode"] == mode or (mode == "best" and row["mode"] not in BITS))
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
        plain = max(
            (r["tokens_per_second"] for r in rows if alone(r) and r["mode"] not in BITS), default=0
        )
        for row in rows:
            if plain and alone(row) and row["mode"] in BITS and name == "tnl-7b":
                value, least = row["tokens_per_second"] / plain, SPEEDUPS[row["mode"]]
                met = {"value": value, "at_least": least, "met": value >= least}
                made[f"{name} {row['mode']} speedup"] = met
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
    parts = [*MODES, "prefill", "hf_llama"]
    parser.add_argument("--modes", nargs="+", choices=parts, default=parts)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--check", action="store_true", help="compare fused steps, time nothing")
    parser.add_argument("--budget", type=float, default=1e9, help="begin no row after so many s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "decode_gpu.json")
    return parser.parse_args()


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    """Model, part, context and batch of what was asked for, each once, in their order."""
    seen: set[tuple[str, str, int, int]] = set()
    for only, part, contexts, batches in ORDER:
        for name in [only] if only else options.models:
            whole = part in ("prefill", "hf_llama")
            pairs = [(0, 0)] if whole else [*product(contexts, batches)]
            for context, batch in pairs:
                asked = whole or (context in options.contexts and batch in options.batches)
                cell: tuple[str, str, int, int] = (str(name), part, context, batch)
                if asked and name in options.models and part in options.modes and cell not in seen:
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
        self.gb_per_s: float = result["copy_gb_per_s"]
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

    def drop(self) -> None:
        """Forget the model at hand."""
        self._model = None
        self.clock.free()

    def run(self, name: str, part: str, context: int, batch: int) -> None:
        """One cell, into the result."""
        found = self.result["models"].setdefault(name, {"decode": []})
        if part == "hf_llama":
            self.drop()
            config = config_of(name, self.clock.dry)
            made = found[part] = hugging_face_llama(config, self.options.batches, self)
        elif part == "prefill":
            made = found[part] = prefill_rows(self.model(name, part), self.clock)
        else:
            made = decode_row(self.model(name, part), part, context, batch, self)
            found["decode"].append(made)
        print(f"{name} {part} {json.dumps(rounded(made))}", flush=True)

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
        "check": check(clock),
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
    bench = Bench(options, clock, result)
    for cell in cells(options) if not options.check else ():
        if time.monotonic() - began > options.budget:
            result["left_out"].append(" ".join(map(str, cell)))
            continue
        try:
            bench.run(*cell)
        except Exception as error:
            result["failures"].append(f"{' '.join(map(str, cell))}: {error_text(error)}")
            bench.drop()
            if is_lost(error):
                break
        bench.write()
    result["seconds"] = time.monotonic() - began
    harness.publish(result, options.output, SHORT)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
