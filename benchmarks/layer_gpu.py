"""Claim: a layer with data-dependent gates costs at most 1.5 times a TransNormerLLM layer.

One block (both mixers and norms) of width 1,024 of each model, forward and backward under bfloat16
autocast, at the same 32,768 tokens in rows of 2,048 to 32,768, and one row of 131,072. The
comparison is with a TransNormerLLM block without LRPE, as all but its first are; LightNet stands
with LRPE, as the paper's language model has it, and without, as the public implementation. Writes
benchmarks/results/layer_gpu.json; the last line is JSON.

    python benchmarks/layer_gpu.py
    python benchmarks/layer_gpu.py --profile        the costliest kernels beside, at 32,768
    python benchmarks/layer_gpu.py --device cpu     a dry run at toy sizes: its numbers mean nothing
"""

import argparse
from pathlib import Path
from typing import Any

import harness
import torch
from gpu_timing import Clock
from op_gpu import rounded
from torch import Tensor, nn

from transnormer.models import zoo
from transnormer.models.decoder import Decoder, DecoderConfig

LENGTHS = (2_048, 8_192, 32_768, 131_072)
TOKENS = 32_768
BASELINE = "tnl"
TARGETS = {"share": 1.5, "slowest_over_fastest": 1.2}
SHORT = ("benchmark", "verdicts")


def configurations(toy: bool) -> dict[str, DecoderConfig]:
    """One block of width 1,024 of each model, over a vocabulary that plays no part."""
    lightnet = zoo.lightnet("410m", vocab_size=8)
    kept = lightnet.blocks[-1]
    plain = kept.model_copy(
        update={"token_mixer": kept.token_mixer.model_copy(update={"lrpe": False})}
    )
    tnl = zoo.tnl("385m", vocab_size=8)
    found = {
        BASELINE: (tnl, tnl.blocks[-1]),
        "tnl_first_layer": (tnl, tnl.blocks[0]),
        "hgrn2": (hgrn2 := zoo.hgrn2("410m", vocab_size=8), hgrn2.blocks[-1]),
        "lightnet_lrpe": (lightnet, kept),
        "lightnet": (lightnet, plain),
    }
    small = {"model_dim": 128} if toy else {}
    return {
        name: model.model_copy(update={"blocks": (block, block), **small})
        for name, (model, block) in found.items()
    }


class OneBlock(nn.Module):
    """The second of two blocks, so that bounds and decays are those of a layer in the middle."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        self.kind = config.blocks[1].token_mixer.kind

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        shared = self.decoder.shared[self.kind]() if self.kind in self.decoder.shared else None
        y, _ = self.decoder.blocks[1](
            x,
            positions=positions,
            cu_seqlens=None,
            mask=None,
            state=None,
            shared=shared,
            keep_state=False,
        )
        return y


def measure(module: OneBlock, rows: int, seq: int, clock: Clock, top: int) -> dict[str, Any]:
    """Milliseconds of forward and backward together, peak memory, and the costliest kernels."""
    width, device = module.decoder.config.model_dim, clock.device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, seq, width, generator=generator, device=device).bfloat16()
    x.requires_grad_()
    positions = torch.arange(seq, device=device).expand(rows, seq)
    do = torch.randn(rows, seq, width, generator=generator, device=device).bfloat16()
    leaves = [x, *(p for p in module.decoder.blocks[1].parameters() if p.requires_grad)]

    def step() -> None:
        with torch.autocast(clock.device, torch.bfloat16):
            y = module(x, positions)
        torch.autograd.grad(y, leaves, do.to(y.dtype))

    _, first = clock.first(step)
    found: dict[str, Any] = {"rows": rows, "seq": seq, "ms": clock.time(step).ms}
    found |= {"us_per_token": 1e3 * found["ms"] / (rows * seq), "first_call_s": first}
    found["peak_extra_mib"] = clock.peak_extra_mib(step)
    if top and not clock.dry:
        found["kernels"] = costliest(step, top)
    return found


def costliest(call: Any, top: int) -> list[dict[str, Any]]:
    """Names, counts and milliseconds of the kernels that took longest in one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        call()
        torch.cuda.synchronize()
    events = sorted(record.key_averages(), key=lambda e: -e.self_device_time_total)
    return [
        {"name": e.key[:90], "count": e.count, "ms": e.self_device_time_total / 1e3}
        for e in events[:top]
    ]


def verdicts(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each layer against the baseline at 32,768 tokens in one row, and over lengths."""

    def at(name: str) -> dict[str, Any]:
        return next(row for row in found[name] if row["seq"] == LENGTHS[2])

    made: dict[str, Any] = {}
    for name, rows in found.items():
        if any("error" in row for row in (*rows, *found[BASELINE])):
            continue
        per_token = [row["us_per_token"] for row in rows]
        values = {
            "share": at(name)["ms"] / at(BASELINE)["ms"],
            "slowest_over_fastest": max(per_token) / min(per_token),
        }
        made[name] = {
            key: {"value": value, "at_most": TARGETS[key], "met": value <= TARGETS[key]}
            for key, value in values.items()
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", nargs="+", help="of them alone; the baseline always")
    parser.add_argument("--profile", type=int, nargs="?", const=12, default=0, metavar="KERNELS")
    parser.add_argument("--commit", help="for a copy of the tree that has no history")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "layer_gpu.json")
    options = parser.parse_args()
    clock = Clock(options.device)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, config in configurations(clock.dry).items():
        if options.layers and name not in (BASELINE, *options.layers):
            continue
        torch.manual_seed(0)
        with torch.device(options.device):
            module = OneBlock(config)
        found[name] = []
        for seq in LENGTHS:
            rows, length = (1, seq // 256) if clock.dry else (max(TOKENS // seq, 1), seq)
            row: dict[str, Any]
            try:
                row = measure(module, rows, length, clock, options.profile * (seq == LENGTHS[2]))
            except torch.OutOfMemoryError as error:
                row = {"rows": rows, "error": str(error).splitlines()[0][:200]}
            found[name].append(row | {"seq": seq})
            print(
                f"{name}: {rounded({k: x for k, x in row.items() if k != 'kernels'})}", flush=True
            )
            for kernel in row.get("kernels", ()):
                print(f"    {kernel['ms']:.3f} ms {kernel['count']:4d} x {kernel['name']}")
            clock.free()
    result: dict[str, Any] = {
        "benchmark": "layer_gpu",
        "environment": harness.gpu_environment(options.commit),
        "width": 1_024,
        "layers": found,
        "verdicts": {} if clock.dry else verdicts(found),
    }
    for name, verdict in result["verdicts"].items():
        print(f"{name}: {rounded(verdict)}")
    harness.publish(result, options.output, SHORT)


if __name__ == "__main__":
    main()
