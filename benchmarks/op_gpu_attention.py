"""The attention rows of op_gpu: correctness first, then ours at both decays, then the peers."""

import time
from typing import Any

import torch
from exact import exact_attention, frobenius_error
from gpu_timing import Clock, Timing, gradients
from op_gpu_rows import DTYPES, LAYERS, MEMORY_TARGET, Row, slopes
from subjects import Call, Subject, error_text, is_lost
from torch import Tensor

from transnormer.ops import linear_attention

# Relative Frobenius error against float64: outputs, gradients.
ERROR_LIMITS = {"bf16": (4e-3, 6e-3), "fp16": (5e-4, 7.5e-4), "fp32": (2e-6, 1e-5)}
PREFIX = 2048
# Rows that the device does in about the time that the host takes to launch them.
SHORT_BYTES = 150e6


def make_tensors(row: Row, seq_dim: int, device: str, count: int = 4) -> list[Tensor]:
    """q, k, v, do in the layout of a subject, the same values for every subject."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (row.batch, row.seq, row.heads, row.dim)
    tensors = []
    for _ in range(count):
        x = torch.randn(shape, generator=generator, device=device, dtype=DTYPES[row.dtype])
        tensors.append(x if seq_dim == 1 else x.transpose(1, 2).contiguous())
    return tensors


def check_ours(call: Call, row: Row, log_decay: Tensor, device: str) -> dict[str, Any]:
    """Errors of outputs and gradients on corners of the row.

    The first tokens of the first batch row against the whole masked matrix; two heads over the
    whole length, the last one of the last batch row among them, against float64 chunks.
    """
    q, k, v, do = make_tensors(row, 1, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, _ = call(*leaves, log_decay)
    actual = (o.detach(), *torch.autograd.grad(o, leaves, do))
    heads = [0, row.heads - 1]
    with torch.no_grad():
        n = min(row.seq, PREFIX)
        q_, k_, v_ = (x[:1, :n, heads] for x in (q, k, v))
        prefix, _ = exact_attention(q_, k_, v_, log_decay[heads])
        errors = {"o_prefix": frobenius_error(actual[0][:1, :n, heads], prefix)}
    names = ("o", "dq", "dk", "dv")
    errors |= dict.fromkeys(names, 0.0)
    for batch, head in ((0, 0), (row.batch - 1, row.heads - 1)):
        part = (slice(batch, batch + 1), slice(None), slice(head, head + 1))
        doubles = [x.detach()[part].double().requires_grad_() for x in (q, k, v)]
        q_, k_, v_ = doubles
        decay = log_decay[head : head + 1].double()
        whole, _ = linear_attention(q_, k_, v_, decay, implementation="chunked")
        exact = (whole.detach(), *torch.autograd.grad(whole, doubles, do[part].double()))
        for name, x, y in zip(names, actual, exact, strict=True):
            errors[name] = max(errors[name], frobenius_error(x[part], y))
    forward_limit, gradient_limit = ERROR_LIMITS[row.dtype]
    within = all(
        error <= (forward_limit if name.startswith("o") else gradient_limit)
        for name, error in errors.items()
    )
    return {"errors": errors, "limits": [forward_limit, gradient_limit], "within": within}


def _time_backward(
    call: Call, leaves: list[Tensor], log_decay: Tensor, do: Tensor, clock: Clock
) -> tuple[Timing, float]:
    """The backward pass alone, and the seconds of the first one; the graph ends with the call."""
    o, _ = call(*leaves, log_decay)
    _, first = clock.first(lambda: gradients(o, leaves, do))
    return clock.time(lambda: gradients(o, leaves, do)), first


def measure(
    subject: Subject, call: Call, row: Row, log_decay: Tensor, clock: Clock, *, bandwidth: float
) -> dict[str, Any]:
    """Times of the forward and backward pass alone, and their peak memory together."""
    q, k, v, do = make_tensors(row, subject.seq_dim, clock.device)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(q, k, v, log_decay)[0]

    o, first_forward = clock.first(forward)
    result: dict[str, Any] = {"finite": bool(o.isfinite().all())}
    del o
    times = {"forward": clock.time(forward)}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    times["backward"], first_backward = _time_backward(call, leaves, log_decay, do, clock)
    memory = clock.peak_extra_mib(
        lambda: torch.autograd.grad(call(*leaves, log_decay)[0], leaves, do)
    )
    needed = {"forward": row.forward_bytes, "backward": row.backward_bytes}
    for name, timing in times.items():
        floor = needed[name] / bandwidth / 1e6
        result[f"{name}_ms"] = timing.ms
        result[f"{name}_ms_p20_p80"] = [timing.p20, timing.p80]
        result[f"{name}_percent_of_floor"] = 100 * floor / timing.ms
    result["peak_extra_mib"] = memory
    result["first_call_s"] = {"forward": first_forward, "backward": first_backward}
    return result


def measure_in_a_graph(call: Call, row: Row, log_decay: Tensor, clock: Clock) -> dict[str, Any]:
    """Times of graph replays: what short rows cost the device when no host is in the way."""
    q, k, v, do = make_tensors(row, 1, clock.device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward() -> None:
        with torch.no_grad():
            call(q, k, v, log_decay)

    def both() -> None:
        torch.autograd.grad(call(*leaves, log_decay)[0], leaves, do)

    try:
        return {
            "forward_ms": clock.time(clock.graph(forward)).ms,
            "forward_and_backward_ms": clock.time(clock.graph(both)).ms,
        }
    except Exception as error:
        if is_lost(error):
            raise
        return {"error": error_text(error)}


def measure_ours(subject: Subject, row: Row, clock: Clock, bandwidth: float) -> dict[str, Any]:
    """Errors and times at the decays of the first and the last layer."""
    call = subject.load()
    result = {}
    for layer in LAYERS:
        log_decay = slopes(row.heads, layer, clock.device)
        # Before the check, which would take the compilation out of the first call.
        timed = measure(subject, call, row, log_decay, clock, bandwidth=bandwidth)
        clock.free()
        result[layer] = check_ours(call, row, log_decay, clock.device) | timed
        if row.forward_bytes <= SHORT_BYTES:
            result[layer]["in_a_graph"] = measure_in_a_graph(call, row, log_decay, clock)
        clock.free()
        check = result[layer]
        errors = "  ".join(f"{name} {error:.1e}" for name, error in check["errors"].items())
        print(f"  {row.name} {layer}: errors {errors}{'' if check['within'] else '  TOO LARGE'}")
    return result


def measure_peers(
    peers: list[Subject], row: Row, clock: Clock, bandwidth: float, deadline: float
) -> dict[str, Any]:
    """Each peer's times at the decay of the first layer, or why there are none."""
    results: dict[str, Any] = {}
    for peer in peers:
        if time.monotonic() > deadline:
            results[peer.name] = {"left_out": "the budget of seconds was spent"}
            continue
        try:
            log_decay = slopes(row.heads, "first_layer", clock.device)
            results[peer.name] = measure(
                peer, peer.load(), row, log_decay, clock, bandwidth=bandwidth
            )
        except Exception as error:
            results[peer.name] = {"error": error_text(error)}
            if is_lost(error):
                raise
        clock.free()
    return results


def ratios(ours: dict[str, Any], peers: dict[str, Any]) -> dict[str, Any]:
    """Our time over each peer's, and over that of the fastest, for each decay and pass."""
    result: dict[str, Any] = {}
    for layer in LAYERS:
        for name in ("forward", "backward"):
            times = {p: r[f"{name}_ms"] for p, r in peers.items() if f"{name}_ms" in r}
            mine = ours[layer][f"{name}_ms"]
            found: dict[str, Any] = {peer: mine / ms for peer, ms in times.items()}
            if times:
                found["best"] = mine / min(times.values())
                found["best_peer"] = min(times, key=lambda peer: times[peer])
            result.setdefault(layer, {})[name] = found
    return result


def verdicts(row: Row, ours: dict[str, Any], ratio: dict[str, Any]) -> dict[str, Any]:
    """Each promise for the row with what was measured, and whether it is kept."""
    result: dict[str, Any] = {}

    def add(name: str, value: float | None, at_most: float) -> None:
        if value is not None:
            result[name] = {"value": value, "at_most": at_most, "met": value <= at_most}

    if row.target is not None:
        peer = row.target.peer
        first, last = ratio["first_layer"], ratio["last_layer"]
        add(f"forward of {peer}", first["forward"].get(peer), row.target.forward)
        add(f"backward of {peer}", first["backward"].get(peer), row.target.backward)
        if row.target.forward_last_layer is not None:
            limit = row.target.forward_last_layer
            add(f"forward of {peer}, last layer", last["forward"].get(peer), limit)
            add(f"backward of {peer}, last layer", last["backward"].get(peer), limit)
        memory = ours["first_layer"]["peak_extra_mib"]
        if memory is not None:
            share = memory * 2**20 / row.output_bytes
            add("peak extra memory of outputs and gradients", share, MEMORY_TARGET)
    return result


def run_row(
    row: Row, ours: Subject, peers: list[Subject], clock: Clock, bandwidth: float, deadline: float
) -> dict[str, Any]:
    """Everything about one row. A failure of ours is recorded as ``error``."""
    started = time.monotonic()
    floors = {
        "forward_ms": row.forward_bytes / bandwidth / 1e6,
        "backward_ms": row.backward_bytes / bandwidth / 1e6,
    }
    result: dict[str, Any] = {
        "row": row.name,
        "shape": {"batch": row.batch, "heads": row.heads, "seq": row.seq, "dim": row.dim},
        "dtype": row.dtype,
        "hbm_floor": floors,
    }
    try:
        result["ours"] = measure_ours(ours, row, clock, bandwidth)
    except Exception as error:
        result["error"] = error_text(error)
        if is_lost(error):
            raise
    clock.free()
    result["peers"] = measure_peers(peers, row, clock, bandwidth, deadline)
    if "ours" in result:
        result["ratios"] = ratios(result["ours"], result["peers"])
        result["targets"] = verdicts(row, result["ours"], result["ratios"])
    result["seconds"] = time.monotonic() - started
    return result
