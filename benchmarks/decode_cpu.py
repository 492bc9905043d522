"""Claim: on a CPU a decoded token costs the same at any context: reading the weights, once.

Prefills a context, then decodes greedily in the engine's pool, by ``CpuStep`` or, with --plain, by
the model. Rows of a batch share one prefilled context: decoding costs the same whatever the tokens
are. Prints a table; the last line is JSON, which also goes to benchmarks/results/decode_cpu.json. A
row's share of the bandwidth is that of reading all weights and reading and writing the states in a
step, against copies of the same run, one beside each row.

    python benchmarks/decode_cpu.py
    python benchmarks/decode_cpu.py --model tnl-385m --weights int8 --contexts 128 --batches 1
"""

import argparse
import time
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from transnormer.infer.pool import FixedPool
from transnormer.infer.quantize import quantize
from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.quantized_weights import plain_parts
from transnormer.models.state import DecoderState

CONTEXTS = [128, 512, 2048, 8192, 32_768]
CHUNK = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def small_config() -> DecoderConfig:
    """A TransNormerLLM of about 46 million parameters: small enough for a long context on a CPU."""
    return zoo.tnl_custom(vocab_size=8192, model_dim=512, num_layers=12, heads=8, glu_dim=1408)


def weight_bytes(model: Decoder) -> int:
    """Bytes of weights that a step reads, integers and scales of quantised ones."""
    parts = plain_parts(model.state_dict())
    if not model.config.tie_embeddings:
        # A row of it alone.
        parts.pop("embedding.weight")
    return sum(x.numel() * x.element_size() for x in parts.values())


def prefill(model: Decoder, context: int) -> tuple[Tensor, DecoderState, float]:
    """The next token, the state after ``context`` random tokens, and the seconds it took."""
    ids = torch.randint(model.config.vocab_size, (1, context))
    state, logits = None, None
    start = time.perf_counter()
    for part in ids.split(CHUNK, 1):
        out = model(part, state=state, logits_to_keep=1)
        logits, state = out.logits, out.state
    took = time.perf_counter() - start
    assert logits is not None
    assert state is not None
    return logits[:, -1:].argmax(-1), state, took


def decode(pool: FixedPool, token: Tensor, steps: int) -> list[float]:
    """Seconds of each greedy step of all slots."""
    times, slots = [], list(range(len(token)))
    for _ in range(steps):
        start = time.perf_counter()
        token = pool.decode(token, slots, len(slots))[:, -1:].argmax(-1)
        times.append(time.perf_counter() - start)
    return times


def copy_gb_per_s() -> float:
    """Bytes read and written a second by a copy, now: the best of some."""
    source = torch.ones(100_000_000, dtype=torch.uint8)
    target, times = torch.empty_like(source), []
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / min(times) / 1e9


def measure(
    model: Decoder, contexts: list[int], batches: list[int], steps: int, *, fused: bool
) -> list[dict[str, Any]]:
    """One row a context and batch."""
    weights = weight_bytes(model)
    rows = []
    for context in contexts:
        token, state, took = prefill(model, context)
        for batch in batches:
            pool = FixedPool(model, batch, fused=fused)
            pool.write(range(batch), state.select([0] * batch))
            token_of_each = token.expand(batch, 1)
            decode(pool, token_of_each, 3)
            copied = copy_gb_per_s()
            times = sorted(decode(pool, token_of_each, steps))
            copied = max(copied, copy_gb_per_s())
            median = times[len(times) // 2]
            states = sum(x.numel() * x.element_size() for x in state.layers) * batch
            rows.append(
                {
                    "context": context,
                    "batch": batch,
                    "ms_per_step": median * 1e3,
                    "ms_per_step_least": times[0] * 1e3,
                    "ms_per_step_p90": times[int(0.9 * (len(times) - 1))] * 1e3,
                    "tokens_per_second": batch / median,
                    "state_bytes": states,
                    "copy_gb_per_s": copied,
                    "share_of_bandwidth": (weights + 2 * states) / median / 1e9 / copied,
                    "share_of_least": (weights + 2 * states) / times[0] / 1e9 / copied,
                    "prefill_tokens_per_second": context / took,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small", help="small, or a name of the zoo: tnl-385m")
    parser.add_argument("--weights", choices=[*DTYPES, "int8"], default="float32")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--plain", action="store_true", help="the model's own step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "decode_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = small_config() if arguments.model == "small" else zoo.get(arguments.model)
    # Integers stand beside activations in bfloat16.
    model = Decoder(config).to(DTYPES.get(arguments.weights, torch.bfloat16)).eval()
    if arguments.weights == "int8":
        quantize(model, 8)
    limits = harness.measured_limits()
    result: dict[str, Any] = {
        "benchmark": "decode_cpu",
        "environment": harness.environment(),
        "limits": limits,
        "model": {
            "name": arguments.model,
            "parameters": model.num_parameters(),
            "weight_bytes": weight_bytes(model),
            "weights": arguments.weights,
            "step": "model" if arguments.plain else "CpuStep",
        },
    }
    with torch.no_grad():
        rows = measure(
            model,
            arguments.contexts,
            arguments.batches,
            arguments.steps,
            fused=not arguments.plain,
        )
    result["rows"] = rows
    ratios = {}
    for batch in arguments.batches:
        times = {r["context"]: r["ms_per_step"] for r in rows if r["batch"] == batch}
        longest, shortest = max(times), min(times)
        name = f"batch {batch}: time per step at context {longest} / at {shortest}"
        ratios[name] = times[longest] / times[shortest]
    result["summary"] = ratios
    harness.print_table(
        ("context", "batch", "ms/step", "tokens/s", "state MB", "bandwidth"),
        [
            (
                r["context"],
                r["batch"],
                f"{r['ms_per_step']:.2f}",
                f"{r['tokens_per_second']:.1f}",
                f"{r['state_bytes'] / 1e6:.2f}",
                f"{r['share_of_bandwidth']:.0%}",
            )
            for r in rows
        ],
    )
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    harness.publish(result, arguments.output)


if __name__ == "__main__":
    main()
