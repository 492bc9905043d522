"""The parts of op_gpu that are no plain row: packing, flatness, decoding, host time, tiles."""

import inspect
from typing import Any

import torch
from exact import frobenius_error
from gpu_timing import Clock, gradients
from op_gpu_attention import ERROR_LIMITS
from op_gpu_gated import gated
from op_gpu_rows import (
    DECODE_TARGET,
    FLATNESS_TARGET,
    HOST_TARGET_US,
    LAYERS,
    PACKED_TARGET,
    flatness_shapes,
    packed_bounds,
    slopes,
)
from subjects import FLA_CHUNK, error_text
from torch import Tensor

from transnormer.ops import linear_attention, linear_attention_step


def _tensors(
    count: int, batch: int, seq: int, heads: int, dim: int, clock: Clock, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator(clock.device).manual_seed(seed)
    shape = (batch, seq, heads, dim)
    return [
        torch.randn(shape, generator=generator, device=clock.device, dtype=torch.bfloat16)
        for _ in range(count)
    ]


def _both_passes(clock: Clock, leaves: list[Tensor], do: Tensor, call: Any) -> dict[str, float]:
    """Milliseconds of the forward pass without gradient and of the backward pass alone."""

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    found = {"forward_ms": clock.time(forward).ms}
    o = call(*leaves)
    found["backward_ms"] = clock.time(lambda: gradients(o, leaves, do)).ms
    return found


def packed(implementation: str, clock: Clock) -> dict[str, Any]:
    """32 documents of uneven length in 65,536 tokens against the same tokens as one sequence."""
    tokens, heads, dim = (640, 2, 16) if clock.dry else (65_536, 16, 128)
    bounds = packed_bounds(tokens)
    q, k, v, do = _tensors(4, 1, tokens, heads, dim, clock)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=clock.device)
    result: dict[str, Any] = {"tokens": tokens, "heads": heads, "dim": dim, "bounds": bounds}
    within, met = True, True
    for layer in LAYERS:
        log_decay = slopes(heads, layer, clock.device)

        def call(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            bounds: Tensor | None = None,
            log_decay: Tensor = log_decay,
        ) -> Tensor:
            return linear_attention(
                q, k, v, log_decay, cu_seqlens=bounds, implementation=implementation
            )[0]

        one = _both_passes(clock, leaves, do, call)
        many = _both_passes(clock, leaves, do, lambda q, k, v: call(q, k, v, cu_seqlens))
        # One head in float64, all documents.
        doubles = [x.detach()[:, :, -1:].double().requires_grad_() for x in leaves]
        q_, k_, v_ = doubles
        decay = log_decay[-1:].double()
        exact, _ = linear_attention(
            q_, k_, v_, decay, cu_seqlens=cu_seqlens, implementation="chunked"
        )
        o = call(q, k, v, cu_seqlens)
        actual = [o.detach(), *gradients(o, leaves, do)]
        wanted = [exact.detach(), *torch.autograd.grad(exact, doubles, do[:, :, -1:].double())]
        errors = [frobenius_error(x[:, :, -1:], y) for x, y in zip(actual, wanted, strict=True)]
        limits = ERROR_LIMITS["bf16"]
        within &= errors[0] <= limits[0] and max(errors[1:]) <= limits[1]
        ratio = {
            "forward": many["forward_ms"] / one["forward_ms"],
            "backward": many["backward_ms"] / one["backward_ms"],
        }
        met &= max(ratio.values()) <= PACKED_TARGET
        result[layer] = {
            "one_sequence": one,
            "packed": many,
            "ratio": ratio,
            "errors": dict(zip(("o", "dq", "dk", "dv"), errors)),
        }
        del o, actual, exact, wanted
    return result | {"within": within, "at_most": PACKED_TARGET, "met": met}


def flatness(implementation: str, clock: Clock) -> dict[str, Any]:
    """Time per token at 1,048,576 tokens a call, sequences from 8k to the whole."""
    heads, dim = (2, 16) if clock.dry else (8, 128)
    shapes = flatness_shapes()
    if clock.dry:
        shapes = [(2, 64), (1, 128)]
    rows: list[dict[str, Any]] = []
    for batch, seq in shapes:
        q, k, v, do = _tensors(4, batch, seq, heads, dim, clock)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        row: dict[str, Any] = {"batch": batch, "seq": seq}
        for layer in LAYERS:
            log_decay = slopes(heads, layer, clock.device)

            def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor = log_decay) -> Tensor:
                return linear_attention(q, k, v, log_decay, implementation=implementation)[0]

            times = _both_passes(clock, leaves, do, call)
            row[layer] = {
                name.replace("_ms", "_ns_per_token"): ms * 1e6 / (batch * seq)
                for name, ms in times.items()
            }
            clock.free()
        rows.append(row)
        del q, k, v, do, leaves
        clock.free()
    spread: dict[str, Any] = {}
    for layer in LAYERS:
        for name in ("forward", "backward"):
            per_token = [row[layer][f"{name}_ns_per_token"] for row in rows]
            value = max(per_token) / min(per_token)
            limit = FLATNESS_TARGET[layer]
            spread[f"{name}, {layer}"] = {"value": value, "at_most": limit, "met": value <= limit}
    return {"heads": heads, "dim": dim, "rows": rows, "slowest_over_fastest": spread}


def _step_options() -> dict[str, Any]:
    # The step names its implementation only in versions that have more than one.
    named = "implementation" in inspect.signature(linear_attention_step).parameters
    return {"implementation": "triton"} if named else {}


def decode(implementation: str, clock: Clock) -> dict[str, Any]:
    """One token in place, in a CUDA graph, against a copy of as many bytes in a graph."""
    heads, dim = (2, 16) if clock.dry else (32, 128)
    options = {} if clock.dry or implementation != "triton" else _step_options()
    rows = []
    for batch in (1, 2) if clock.dry else (1, 8, 64, 256):
        size = batch * heads * dim * dim * 4
        # As many states as make the L2 forget the first of them before it comes round again.
        count = max(1, min(64, -(-(256 << 20) // size))) if not clock.dry else 2
        states = [torch.zeros(batch, heads, dim, dim, device=clock.device) for _ in range(count)]
        inputs = [x[:, 0] for x in _tensors(3, batch, 1, heads, dim, clock)]
        inputs.append(slopes(heads, "first_layer", clock.device))

        @torch.no_grad()
        def steps(states: list[Tensor] = states, inputs: list[Tensor] = inputs) -> None:
            q, k, v, log_decay = inputs
            for state in states:
                linear_attention_step(q, k, v, log_decay, state, inplace=True, **options)

        step_us = clock.time(clock.graph(steps)).ms * 1e3 / count
        sources = [torch.zeros_like(state) for state in states]

        def copies(states: list[Tensor] = states, sources: list[Tensor] = sources) -> None:
            for state, source in zip(states, sources, strict=True):
                state.copy_(source)

        copy_us = clock.time(clock.graph(copies)).ms * 1e3 / count
        share = copy_us / step_us
        row: dict[str, Any] = {
            "batch": batch,
            "us": step_us,
            "state_gb_per_s": 2 * size / step_us / 1e3,
            "copy_us": copy_us,
            "copy_gb_per_s": 2 * size / copy_us / 1e3,
            "share_of_copy": share,
        }
        if batch == 256:
            row |= {"at_least": DECODE_TARGET, "met": share >= DECODE_TARGET}
        rows.append(row)
        del states, sources
        clock.free()
    return {"heads": heads, "dim": dim, "implementation": options or "default", "rows": rows}


def host(implementation: str, clock: Clock, fla: bool = False) -> dict[str, Any]:
    """Host microseconds of one call on an idle device, and of one replay of its graph.

    ``fla``: FLA's too, which must be tuned already; here it would take minutes.
    """
    heads, dim, seq = (2, 16, 32) if clock.dry else (32, 128, 128)
    log_decay = slopes(heads, "first_layer", clock.device)
    q, k, v, do = _tensors(4, 1, seq, heads, dim, clock)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def figures(call: Any) -> dict[str, float]:
        def both() -> None:
            torch.autograd.grad(call(*leaves), leaves, do)

        def no_gradient() -> None:
            with torch.no_grad():
                call(q, k, v)

        for warm in (no_gradient, both):
            warm()
            warm()
        return {
            "forward_without_gradient": clock.host_us(no_gradient),
            "forward_with_gradient": clock.host_us(lambda: call(*leaves)),
            "forward_and_backward": clock.host_us(both),
        }

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, log_decay, implementation=implementation)[0]

    result: dict[str, Any] = {"shape": [1, seq, heads, dim], "ours_us": figures(ours)}

    def forward() -> Tensor:
        with torch.no_grad():
            return ours(q, k, v)

    replay = clock.graph(forward)
    result["ours_us"]["graph_replay"] = clock.host_us(replay)
    result["ours_device_us_in_a_graph"] = clock.time(replay).ms * 1e3
    result["targets"] = {
        name: {
            "value": result["ours_us"][name],
            "at_most": limit,
            "met": result["ours_us"][name] <= limit,
        }
        for name, limit in HOST_TARGET_US.items()
    }
    if fla:
        try:
            peer = FLA_CHUNK.load()
            result["fla_chunk_us"] = figures(lambda q, k, v: peer(q, k, v, log_decay)[0])
        except Exception as error:
            result["fla_chunk_us"] = {"error": error_text(error)}
    return result


def lightning1(implementation: str, clock: Clock) -> dict[str, Any]:
    """Quadratic tiles (Lightning Attention-1) against the linear form, batch 1, 32 heads of 128."""
    heads, dim = (2, 16) if clock.dry else (32, 128)
    lengths = (64, 128) if clock.dry else (1024, 2048, 4096, 8192, 16_384)
    log_decay = slopes(heads, "first_layer", clock.device)
    rows: list[dict[str, Any]] = []
    stopped: dict[str, str] = {}
    for seq in lengths:
        q, k, v, do = _tensors(4, 1, seq, heads, dim, clock)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        for form in ("lightning1", implementation):
            row: dict[str, Any] = {"form": form, "seq": seq}
            rows.append(row)
            if form in stopped:
                row["left_out"] = stopped[form]
                continue

            def call(q: Tensor, k: Tensor, v: Tensor, form: str = form) -> Tensor:
                return linear_attention(q, k, v, log_decay, implementation=form)[0]

            def once(call: Any = call, leaves: list[Tensor] = leaves, do: Tensor = do) -> None:
                gradients(call(*leaves), leaves, do)

            try:
                # Twice: the first call compiles.
                clock.first(once)
                both = clock.first(once)[1]
                if both > 3.0:
                    stopped[form] = f"forward and backward took {both:.1f} s at {seq} tokens"
                    row["left_out"] = stopped[form]
                    continue
                row |= _both_passes(clock, leaves, do, call)
            except Exception as error:
                if form == implementation:
                    raise
                stopped[form] = error_text(error)
                row["error"] = stopped[form]
        clock.free()
    return {"heads": heads, "dim": dim, "rows": rows}


RUN = {
    "packed": packed,
    "flatness": flatness,
    "decode": decode,
    "host": host,
    "lightning1": lightning1,
    "gated": gated,
}
