"""The part "gated" of op_gpu: log decay a token, or a token and key, beside flash-linear-attention."""

import json
from importlib import import_module
from typing import Any

import torch
from exact import frobenius_error
from gpu_timing import Clock, gradients
from subjects import error_text, is_lost
from torch import Tensor

from transnormer.ops import linear_attention

# batch, heads, seq, dim
SHAPES = ((4, 16, 4096, 128), (2, 32, 8192, 128), (1, 16, 65_536, 128))
KINDS = ("token", "key")
# Shares of the fastest peer's time, forward and backward, and of its peak memory.
TARGETS = {"forward": 0.6, "backward": 0.5, "memory": 1.0}
# Errors against float64 in bfloat16: outputs, gradients.
LIMITS = (4e-3, 8e-3)
# module and function of each kind's peers
PEERS = {
    "token": {
        "fla_chunk_simple_gla": ("fla.ops.simple_gla", "chunk_simple_gla"),
        "fla_chunk_simple_gla_unguarded": ("fla.ops.simple_gla", "chunk_simple_gla"),
    },
    "key": {"fla_chunk_gla": ("fla.ops.gla", "chunk_gla")},
}
# With Triton 3.4 to 3.7.0 on Hopper this module refuses the backward pass of gates, since its
# results were wrong there. Without the refusal its time is known; a share counts if it is right.
GUARDED = ("fla.ops.common.chunk_o", "TRITON_ABOVE_3_7_1")


def make_leaves(shape: tuple[int, ...], kind: str, device: str) -> tuple[list[Tensor], Tensor]:
    """q, k, v, log_decay, and the gradient of the outputs, the same for every subject."""
    batch, heads, seq, dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(batch, seq, heads, dim, generator=generator, device=device)

    q, k, v, do = (draw().bfloat16() for _ in range(4))
    # Of a trained layer's size: half of the gates within 0.9 and 0.98.
    log_decay = torch.nn.functional.logsigmoid(draw() + 3.0)
    if kind == "token":
        log_decay = log_decay[..., 0].contiguous()
    return [x.detach().requires_grad_() for x in (q, k, v, log_decay)], do


def floors(shape: tuple[int, ...], kind: str, bandwidth: float) -> dict[str, float]:
    """Milliseconds that the bytes of inputs and outputs take, each moved once."""
    batch, heads, seq, dim = shape
    rows = batch * heads * seq
    gates = 4 * (dim if kind == "key" else 1)
    moved = {"forward": 4 * 2 * dim + gates, "backward": 7 * 2 * dim + 2 * gates}
    return {name: rows * size / bandwidth / 1e6 for name, size in moved.items()}


def time_backward(call: Any, leaves: list[Tensor], do: Tensor, clock: Clock) -> tuple[float, float]:
    """Milliseconds of the backward pass, seconds of the first; the graph ends with the call."""
    o = call(*leaves)
    _, first = clock.first(lambda: gradients(o, leaves, do))
    return clock.time(lambda: gradients(o, leaves, do)).ms, first


def measure(call: Any, shape: tuple[int, ...], kind: str, clock: Clock) -> dict[str, Any]:
    """Times of both passes alone, their peak memory together."""
    leaves, do = make_leaves(shape, kind, clock.device)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    _, first = clock.first(forward)
    found: dict[str, Any] = {"forward_ms": clock.time(forward).ms}
    backward, first_backward = time_backward(call, leaves, do, clock)
    found["backward_ms"] = backward
    found["peak_extra_mib"] = clock.peak_extra_mib(
        lambda: torch.autograd.grad(call(*leaves), leaves, do)
    )
    return found | {"first_call_s": [first, first_backward]}


def check(call: Any, shape: tuple[int, ...], kind: str, clock: Clock) -> dict[str, Any]:
    """Errors of the last head of the last batch row against float64 chunks."""
    leaves, do = make_leaves(shape, kind, clock.device)
    o = call(*leaves)
    actual = (o.detach(), *torch.autograd.grad(o, leaves, do))
    part = (slice(-1, None), slice(None), slice(-1, None))
    doubles = [x.detach()[part].double().requires_grad_() for x in leaves]
    q, k, v, log_decay = doubles
    whole, _ = linear_attention(q, k, v, log_decay, implementation="chunked")
    exact = (whole.detach(), *torch.autograd.grad(whole, doubles, do[part].double()))
    names = ("o", "dq", "dk", "dv", "dg")
    errors = {n: frobenius_error(x[part], y) for n, x, y in zip(names, actual, exact, strict=True)}
    within = all(error <= LIMITS[name != "o"] for name, error in errors.items())
    return {"errors": errors, "within": within}


def peer_call(name: str, module: str, function: str) -> Any:
    """A peer of flash-linear-attention with our arguments, without scale."""
    run: Any = getattr(import_module(module), function)
    guarded, constant = GUARDED
    setattr(import_module(guarded), constant, name.endswith("unguarded"))
    return lambda q, k, v, g: run(q, k, v, g=g, scale=1.0)[0]


def warm_jobs() -> list[tuple[str, list[str]]]:
    """(kind, arguments) of each process that compiles the peers' kernels: anew for each head count.

    chunk_gla has hundreds of candidates, so several processes share them.
    """
    kinds = {(heads, dim): (1, heads, 1024, dim) for _, heads, _, dim in SHAPES}
    names = ["x".join(map(str, shape)) for shape in kinds.values()]
    shares = {"token": 1, "key": 6}
    return [
        (kind, [name, f"{i}/{shares[kind]}"])
        for kind in KINDS
        for name in names
        for i in range(shares[kind])
    ]


def take_share(share: str) -> None:
    """Leave Triton's tuners each n-th of their candidates, before a peer is imported."""
    from triton.runtime.autotuner import Autotuner

    first, step = (int(x) for x in share.split("/"))
    original: Any = Autotuner.__init__

    def init(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **options: Any) -> None:
        original(self, fn, arg_names, configs[first::step] or configs[:1], *rest, **options)

    Autotuner.__init__ = init


def warm_one(kind: str, arguments: list[str], clock: Clock) -> dict[str, Any]:
    """First forward and backward of a kind's peers, in a process of its own; their seconds."""
    *shapes, share = arguments
    take_share(share)
    found: dict[str, Any] = {}
    for name in shapes:
        leaves, do = make_leaves(tuple(int(size) for size in name.split("x")), kind, clock.device)
        for peer, where in PEERS[kind].items():
            call = peer_call(peer, *where)
            seconds = found[f"{peer} {name}"] = {}
            try:
                o, seconds["forward"] = clock.first(lambda call=call, leaves=leaves: call(*leaves))
                _, seconds["backward"] = clock.first(
                    lambda o=o, leaves=leaves, do=do: gradients(o, leaves, do)
                )
            except Exception as error:
                seconds["error"] = error_text(error)
                if is_lost(error):
                    raise
    return found


def gated(implementation: str, clock: Clock, *, bandwidth: float) -> dict[str, Any]:
    """Each shape and kind of gate, ours beside the peers, with shares of the fastest."""

    def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return linear_attention(q, k, v, log_decay, implementation=implementation)[0]

    rows = []
    for kind in KINDS:
        for full in SHAPES:
            shape = (1, 2, 70, 16) if clock.dry else full
            row: dict[str, Any] = {"row": "x".join(map(str, full)), "gate": kind}
            row["hbm_floor_ms"] = floors(shape, kind, bandwidth)
            row["ours"] = measure(ours, shape, kind, clock)
            clock.free()
            row["ours"] |= check(ours, shape, kind, clock)
            clock.free()
            for name, where in PEERS[kind].items():
                try:
                    call = peer_call(name, *where)
                    row[name] = measure(call, shape, kind, clock)
                    clock.free()
                    row[name] |= check(call, shape, kind, clock)
                except Exception as error:
                    row[name] = {"error": error_text(error)}
                    if is_lost(error):
                        raise
                clock.free()
            row["shares"] = shares(row, list(PEERS[kind]))
            rows.append(row)
            print(f"{row['row']} {kind}: {json.dumps(row['shares'])}", flush=True)
    return {"rows": rows, "within": all(row["ours"]["within"] for row in rows)}


def shares(row: dict[str, Any], peers: list[str]) -> dict[str, Any]:
    """Ours over the best peer's, and whether that is what was promised."""
    found = {}
    keys = {"forward": "forward_ms", "backward": "backward_ms", "memory": "peak_extra_mib"}
    for name, key in keys.items():
        # A peer whose results are wrong is none.
        right = [row[peer] for peer in peers if row[peer].get("within") or name == "forward"]
        values = [peer[key] for peer in right if peer.get(key) is not None]
        if values and row["ours"][key] is not None:
            share = row["ours"][key] / min(values)
            met = share <= TARGETS[name]
            found[name] = {"value": share, "at_most": TARGETS[name], "met": met}
    return found
