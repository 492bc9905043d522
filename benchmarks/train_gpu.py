"""Claim: on one GPU TransNormerLLM trains at the speed of the hardware, at every length.

Whole training steps (forward, backward, clipping, AdamW) of 24 x 1,024 models, about 0.4 B
parameters, vocabulary 64,000, in bfloat16, at 32,768 tokens a step in rows of 2,048, 8,192 and
32,768, and 131,072 tokens in one row:

- tnl: the trainer's own step, blocks compiled; tnl_eager without compilation;
- llama: our LLaMA of the same size in the same step, compiled, attention by cuDNN;
- hf_llama, hf_llama_compiled: transformers' LLaMA with SDPA, weights and states in bfloat16, which
  is the faster for it, torch's fused AdamW.

Every figure is the median over steps after the first three. ``--profile`` adds the kernels of one
step. Writes benchmarks/results/train_gpu.json; the last line is JSON.

    python benchmarks/train_gpu.py
    python benchmarks/train_gpu.py --subjects tnl llama --lengths 2048 32768 --profile
    python benchmarks/train_gpu.py --device cpu     a dry run at toy sizes: its numbers mean nothing
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from op_gpu import rounded
from subjects import error_text, is_lost
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from transnormer.models import zoo
from transnormer.models.compilation import compile_blocks
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.optim import OptimizerConfig, build_optimizer

LENGTHS = (2_048, 8_192, 32_768, 131_072)
TOKENS = 32_768
SUBJECTS = ("tnl", "llama", "tnl_eager", "hf_llama", "hf_llama_compiled")
SIZES = {"vocab_size": 64_000, "model_dim": 1_024, "num_layers": 24, "heads": 8, "glu_dim": 2_816}
TOY = {"vocab_size": 512, "model_dim": 64, "num_layers": 2, "heads": 2, "glu_dim": 96}
# Tokens a second of tnl, and its least share of another's in the same run, by length.
TARGETS = {2_048: 190_000, 8_192: 190_000, 32_768: 190_000, 131_072: 180_000}
SHARES = {
    "llama": {2_048: 1.05, 8_192: 1.4, 32_768: 2.7},
    "hf_llama": {2_048: 1.85, 8_192: 2.2, 32_768: 3.6},
    "hf_llama_compiled": {2_048: 1.85, 8_192: 2.2, 32_768: 3.6},
}
# Peak memory at 32,768 tokens a step, in 10^9 bytes.
MEMORY_GB = 32.0
WARMUP, SHORT = 3, ("benchmark", "verdicts")


class Step(NamedTuple):
    """A training step of one subject: what runs it, and the model it changes."""

    run: Callable[[Tensor], Tensor]
    model: nn.Module


def our_step(config: DecoderConfig, device: str, *, compiled: bool) -> Step:
    """The trainer's step for a model of ours."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(config).train()
    optimizer = build_optimizer(model, OptimizerConfig(lr=3e-4))
    if compiled:
        compile_blocks(model)
    parameters = list(model.parameters())

    def run(ids: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = model.loss(ids[:, :-1], ids[:, 1:], reduction="sum") / ids[:, 1:].numel()
        loss.backward()
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Step(run, model)


def hugging_face_step(sizes: dict[str, int], device: str, *, compiled: bool) -> Step:
    """transformers' LLaMA with SDPA, all in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    make: Any = LlamaConfig
    config = make(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["model_dim"],
        intermediate_size=sizes["glu_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        tie_word_embeddings=True,
        max_position_embeddings=max(LENGTHS),
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    called: Any = torch.compile(model) if compiled else model

    def run(ids: Tensor) -> Tensor:
        loss = called(input_ids=ids[:, :-1].contiguous(), labels=ids[:, :-1].contiguous()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Step(run, model)


def build(name: str, device: str) -> Step:
    """A subject, by name."""
    sizes = SIZES if device == "cuda" else TOY
    if name.startswith("hf_llama"):
        return hugging_face_step(sizes, device, compiled=name.endswith("compiled"))
    if name == "llama":
        config = zoo.llama_custom(**sizes, tie_embeddings=True)
        return our_step(config, device, compiled=True)
    return our_step(zoo.tnl_custom(**sizes), device, compiled=name == "tnl" and device == "cuda")


def attention_by(name: str, device: str) -> AbstractContextManager[Any]:
    """cuDNN's attention for our LLaMA; torch's choice for the others."""
    if name != "llama" or device == "cpu":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION])


def measure(step: Step, rows: int, seq: int, device: str, steps: int, top: int) -> dict[str, Any]:
    """Seconds of the first step, the median after it, tokens a second and peak memory."""
    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    vocab_size = SIZES["vocab_size"] if cuda else TOY["vocab_size"]
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(vocab_size, (rows, seq + 1), device=device, generator=generator)
    times, losses = [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP + steps):
        wait()
        began = time.perf_counter()
        losses.append(step.run(ids))
        wait()
        times.append(time.perf_counter() - began)
    median = statistics.median(times[WARMUP:])
    found: dict[str, Any] = {
        "rows": rows,
        "seq": seq,
        "first_step_s": times[0],
        "step_ms": 1e3 * median,
        "slowest_ms": 1e3 * max(times[WARMUP:]),
        "tokens_per_second": rows * seq / median,
        "losses": [float(losses[0]), float(losses[-1])],
    }
    if cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if top and cuda:
        found["kernels"], found["kernels_ms"] = kernels_of(lambda: step.run(ids), top)
    return found


def kernels_of(call: Callable[[], object], top: int) -> tuple[list[dict[str, Any]], float]:
    """The costliest kernels of one call, and the milliseconds of all of them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    events = sorted(record.key_averages(), key=lambda e: -e.self_device_time_total)
    rows = [
        {"name": e.key[:110], "count": e.count, "ms": e.self_device_time_total / 1e3}
        for e in events[:top]
    ]
    return rows, sum(e.self_device_time_total for e in events) / 1e3


def verdicts(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The targets, each with its value and whether it is met."""

    def at(name: str, seq: int) -> dict[str, Any] | None:
        rows = found.get(name, [])
        return next((r for r in rows if r["seq"] == seq and "step_ms" in r), None)

    made: dict[str, Any] = {}
    for seq, least in TARGETS.items():
        mine = at("tnl", seq)
        if mine is None:
            continue
        values: dict[str, tuple[float, float]] = {
            "tokens_per_second": (mine["tokens_per_second"], least)
        }
        for peer, shares in SHARES.items():
            if seq in shares and (other := at(peer, seq)) is not None:
                value = mine["tokens_per_second"] / other["tokens_per_second"]
                values[f"over_{peer}"] = (value, shares[seq])
        made[str(seq)] = {
            key: {"value": value, "at_least": goal, "met": value >= goal}
            for key, (value, goal) in values.items()
        }
        if seq <= TOKENS and "peak_gb" in mine:
            value = mine["peak_gb"]
            met = value <= MEMORY_GB
            made[str(seq)]["peak_gb"] = {"value": value, "at_most": MEMORY_GB, "met": met}
    return made


def run_subject(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lengths of one subject; a failure costs its own row."""
    rows: list[dict[str, Any]] = []
    device = options.device
    step = build(name, device)
    for seq in options.lengths:
        count, length = (max(TOKENS // seq, 1), seq) if device == "cuda" else (2, seq // 64)
        row: dict[str, Any]
        try:
            with attention_by(name, device):
                row = measure(step, count, length, device, options.steps, options.profile)
        except Exception as error:
            row = {"error": error_text(error)}
            if is_lost(error):
                raise
        rows.append(row | {"seq": seq})
        shown = {key: value for key, value in row.items() if key != "kernels"}
        print(f"{name} {seq}: {json.dumps(rounded(shown))}", flush=True)
        for kernel in row.get("kernels", ()):
            print(f"    {kernel['ms']:8.3f} ms {kernel['count']:5d} x {kernel['name']}")
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--steps", type=int, default=12, help="timed, after three")
    parser.add_argument("--profile", type=int, nargs="?", const=25, default=0, metavar="KERNELS")
    parser.add_argument(
        "--budget", type=float, default=1e9, help="start no subject after so many s"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "train_gpu.json")
    options = parser.parse_args()
    began = time.monotonic()
    tnl = zoo.tnl_custom(**(SIZES if options.device == "cuda" else TOY))
    result: dict[str, Any] = {
        "benchmark": "train_gpu",
        "environment": harness.gpu_environment(options.commit),
        "sizes": SIZES,
        "parameters": ModelCost.of(tnl).parameters,
        "subjects": {},
    }
    for name in options.subjects:
        if time.monotonic() - began > options.budget:
            result["subjects"][name] = [{"seq": 0, "left_out": "the seconds were spent"}]
            continue
        try:
            result["subjects"][name] = run_subject(name, options)
        except Exception as error:
            result["subjects"][name] = [{"seq": 0, "error": error_text(error)}]
            print(f"{name}: {error_text(error)}", flush=True)
            if is_lost(error):
                break
        torch._dynamo.reset()
        result["verdicts"] = verdicts(result["subjects"])
        harness.publish(result, options.output, SHORT)
    for seq, verdict in result["verdicts"].items():
        print(f"{seq}: {json.dumps(rounded(verdict))}")
    harness.publish(result, options.output, SHORT)


if __name__ == "__main__":
    main()
