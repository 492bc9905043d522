"""The grid of peers_correctness, and how one subject's results are judged against float64.

Each case runs eight heads with eight slopes, so that one call shows at which decay a subject is
wrong. An error is the norm of the difference over the norm of the truth, by batch row and head,
over the whole sequence and over what lies behind its last whole 64 tokens, or the last 64 (there
half as strict: fewer numbers).
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from exact import exact_attention, frobenius_error
from subjects import Call, Subject, error_text, is_lost
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# No decay, hardly any, ALiBi's of 32 heads (last, middle, first), the paper's first layer, an
# extreme, no history at all.
SLOPES = (0.0, 1e-6, 2.0**-8, 0.25, 0.84, 7.75, 30.0, float("inf"))
LENGTHS = (1, 15, 63, 64, 65, 100, 127, 128, 257, 1000, 4097)
SIZES = ((16, 16), (32, 32), (96, 96), (128, 128), (192, 192), (256, 256), (64, 128), (128, 64))
# Empty and one-token sequences, a chunk, a chunk and one token.
BOUNDS = (0, 1, 1, 64, 65, 65, 193, 258, 1000, 1063)
# Outputs (and the state), gradients: three roundings to the dtype, four; fp32 is IEEE float32.
LIMITS = {"bf16": (4e-3, 6e-3), "fp16": (5e-4, 7.5e-4), "fp32": (2e-6, 1e-5)}
# No rounding explains more than this; between the limit and this a result is imprecise.
WRONG = 0.05
RESULTS = ("o", "final_state", "dq", "dk", "dv", "dinitial_state")


class Case(NamedTuple):
    """One call."""

    seq: int
    key_dim: int
    value_dim: int
    dtype: str
    initial_state: bool = False
    packed: bool = False
    decay: bool = True

    @property
    def name(self) -> str:
        """For tables."""
        extras = (
            *(("packed",) if self.packed else ()),
            *(("initial state",) if self.initial_state else ()),
            *(() if self.decay else ("no decay argument",)),
        )
        return ", ".join(
            (f"seq {self.seq}", f"{self.key_dim}x{self.value_dim}", self.dtype, *extras)
        )


def grid() -> list[Case]:
    """All cases, those of one compilation beside each other."""
    cases = [Case(n, 64, 64, dtype) for dtype in DTYPES for n in LENGTHS]
    cases += [Case(n, *size, "bf16") for size in SIZES for n in (100, 257)]
    cases += [Case(257, d, d, dtype) for dtype in ("fp32", "fp16") for d in (32, 128, 256)]
    for dtype, d in (("bf16", 64), ("bf16", 128), ("fp32", 64)):
        cases += [Case(n, d, d, dtype, initial_state=True) for n in (1, 65, 257, 1000)]
        cases.append(Case(BOUNDS[-1], d, d, dtype, initial_state=True, packed=True))
    cases.append(Case(BOUNDS[-1], 64, 64, "bf16", packed=True))
    cases += [Case(n, 64, 64, "bf16", decay=False) for n in (64, 257)]
    return cases


def toy_grid() -> list[Case]:
    """A few small cases, for dry runs."""
    return [
        Case(1, 32, 32, "fp32"),
        Case(65, 32, 32, "fp32", initial_state=True),
        Case(70, 32, 32, "bf16", decay=False),
        Case(BOUNDS[-1], 32, 32, "fp32", packed=True),
    ]


def shard(cases: list[Case], index: int, count: int) -> list[Case]:
    """The cases of one process: what is compiled for the same sizes and dtype stays together."""
    keys = list(dict.fromkeys((c.key_dim, c.value_dim, c.dtype) for c in cases))
    mine = set(keys[index::count])
    return [c for c in cases if (c.key_dim, c.value_dim, c.dtype) in mine]


class Inputs(NamedTuple):
    """Tensors of one case; the cotangents last."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    state: Tensor | None
    do: Tensor
    dstate: Tensor


def make_inputs(case: Case, device: str) -> Inputs:
    """Unit-scale values rounded to the case's dtype; the same for every subject."""
    generator = torch.Generator("cpu").manual_seed(case.seq + 7919 * case.key_dim)
    dtype, heads = DTYPES[case.dtype], len(SLOPES)
    batch = 1 if case.packed or case.seq > 1024 else 2
    rows = len(BOUNDS) - 1 if case.packed else batch

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    q, k = (random(batch, case.seq, heads, case.key_dim).to(dtype) for _ in range(2))
    v, do = (random(batch, case.seq, heads, case.value_dim).to(dtype) for _ in range(2))
    state, dstate = (random(rows, heads, case.key_dim, case.value_dim) for _ in range(2))
    log_decay = -torch.tensor(SLOPES, device=device) if case.decay else None
    return Inputs(q, k, v, log_decay, state if case.initial_state else None, do, dstate)


def exact_results(case: Case, inputs: Inputs, with_state: bool) -> dict[str, Tensor]:
    """Outputs, final state and gradients in float64, with or without a cotangent of the state."""
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    state = None if inputs.state is None else inputs.state.double().requires_grad_()
    bounds = list(BOUNDS) if case.packed else None
    o, final_state = exact_attention(q, k, v, inputs.log_decay, state, bounds)
    leaves = [q, k, v] if state is None else [q, k, v, state]
    results, cotangents = [o], [inputs.do.double()]
    if with_state:
        results.append(final_state)
        cotangents.append(inputs.dstate.double())
    grads = torch.autograd.grad(results, leaves, cotangents)
    names = ("dq", "dk", "dv", "dinitial_state")
    exact = dict(zip(names, grads)) | {"o": o.detach()}
    return exact | ({"final_state": final_state.detach()} if with_state else {})


def subject_results(
    subject: Subject, call: Call, case: Case, inputs: Inputs, device: str
) -> dict[str, Tensor]:
    """The same of a subject, in [batch, seq, heads, dim]; without a final state if it has none."""
    seq_dim = subject.seq_dim
    q, k, v = (x.transpose(1, seq_dim).contiguous().detach().requires_grad_() for x in inputs[:3])
    state = None if inputs.state is None else inputs.state.clone().requires_grad_()
    bounds = torch.tensor(BOUNDS, dtype=torch.int64, device=device) if case.packed else None
    o, final_state = call(
        q, k, v, inputs.log_decay, initial_state=state, final_state=True, cu_seqlens=bounds
    )
    leaves = [q, k, v] if state is None else [q, k, v, state]
    results, cotangents = [o], [inputs.do.transpose(1, seq_dim).contiguous()]
    if final_state is not None:
        results.append(final_state)
        cotangents.append(inputs.dstate.to(final_state.dtype))
    grads = torch.autograd.grad(results, leaves, cotangents)
    names = ("dq", "dk", "dv")
    found = {name: x.transpose(1, seq_dim) for name, x in zip(names, grads)}
    found["o"] = o.detach().transpose(1, seq_dim)
    if final_state is not None:
        found["final_state"] = final_state.detach()
    if state is not None:
        found["dinitial_state"] = grads[3]
    return found


def head_errors(name: str, actual: Tensor, exact: Tensor) -> list[float]:
    """The error of each head: the largest over batch rows, and over whole and tail.

    A token whose one product nearly cancels is no measure of precision, so fewer than 16 tokens
    are set against the size of a usual token: of the same head, or for short sequences of all.
    """
    if actual.shape != exact.shape:
        return [float("inf")] * len(SLOPES)
    along_seq = name not in ("final_state", "dinitial_state")
    tokens = exact.shape[1] if along_seq else 0
    tail = (tokens % 64 or 64) if tokens > 64 else 0
    usual = _per_token(exact) if 0 < tokens < 16 else 0.0
    errors = []
    for head in range(len(SLOPES)):
        of_head = []
        for row in range(exact.shape[0]):
            x, y = (t[row, :, head] if along_seq else t[row, head] for t in (actual, exact))
            of_head.append(frobenius_error(x, y, usual * tokens**0.5))
            if tail:
                floor = _per_token(y) * tail**0.5 if tail < 16 else 0.0
                of_head.append(frobenius_error(x[-tail:], y[-tail:], floor) / 2)
        errors.append(max(of_head))
    return errors


def _per_token(exact: Tensor) -> float:
    """Root mean square over tokens (and rows and heads) of the norm of one."""
    return exact.norm().item() / (exact.numel() / exact.shape[-1]) ** 0.5


def judge(subject: Subject, call: Call, case: Case, device: str) -> Iterator[dict[str, Any]]:
    """One entry a result of the case: errors by head; or one entry that says why there is none."""
    inputs = make_inputs(case, device)
    entry: dict[str, Any] = {"case": case.name, "dtype": case.dtype}
    try:
        found = subject_results(subject, call, case, inputs, device)
        # Faults of a kernel come up where the device is waited for.
        found = {name: x.clone() for name, x in found.items()}
        if device == "cuda":
            torch.cuda.synchronize()
    except NotImplementedError as error:
        yield entry | {"refused": error_text(error)}
        return
    except Exception as error:
        if is_lost(error):
            raise
        yield entry | {"raised": error_text(error)}
        return
    exact = exact_results(case, inputs, "final_state" in found)
    for name in RESULTS:
        if name in exact:
            errors = head_errors(name, found[name], exact[name])
            yield entry | {"result": name, "errors": errors}
    if "final_state" not in found:
        yield entry | {"result": "final_state", "refused": "the package returns no state"}


class Tally(NamedTuple):
    """What came out of one subject for one result and dtype.

    ``example`` is the worst check, or among wrong ones the worst of the mildest slope.
    """

    checks: int
    imprecise: int
    wrong: int
    worst: float
    example: str
    wrong_slopes: list[float]


def limit_of(result: str, dtype: str) -> float:
    """The largest error that counts as precise."""
    output, gradient = LIMITS[dtype]
    return output if result in ("o", "final_state") else gradient


def tally(entries: list[dict[str, Any]], result: str, dtype: str) -> Tally:
    """Counts over cases and heads."""
    limit, checks, imprecise, wrong = limit_of(result, dtype), 0, 0, 0
    worst, wrong_slopes = 0.0, set()
    shown: tuple[tuple[bool, float, float], str] = ((False, 0.0, 0.0), "")
    for entry in entries:
        if entry.get("result") != result or entry["dtype"] != dtype or "errors" not in entry:
            continue
        for slope, error in zip(SLOPES, entry["errors"], strict=True):
            checks += 1
            imprecise += limit < error <= WRONG
            wrong += error > WRONG
            worst = max(worst, error)
            if error > WRONG:
                wrong_slopes.add(slope)
            key = (error > WRONG, -slope if error > WRONG else 0.0, error)
            if key > shown[0]:
                shown = (key, f"{entry['case']}, slope {slope:g}")
    return Tally(checks, imprecise, wrong, worst, shown[1], sorted(wrong_slopes))


def tallies(entries: list[dict[str, Any]]) -> dict[str, dict[str, Tally]]:
    """By result and dtype, those that were checked at all."""
    found: dict[str, dict[str, Tally]] = {}
    for result, dtype in itertools.product(RESULTS, DTYPES):
        counts = tally(entries, result, dtype)
        if counts.checks:
            found.setdefault(result, {})[dtype] = counts
    return found


def _reasons(entries: list[dict[str, Any]], kind: str) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if kind in entry:
            reasons.setdefault(entry[kind], []).append(entry["case"])
    return [f"{len(cases)} x {why} (e.g. {cases[0]})" for why, cases in reasons.items()]


def _number(error: float) -> str:
    return "NaN or infinite" if error == float("inf") else f"{error:.1e}"


def markdown(found: dict[str, list[dict[str, Any]]], versions: dict[str, Any]) -> str:
    """A table of where each subject is wrong, and lists of what it refused."""
    lines = [
        "# Right and wrong, measured",
        "",
        "Written by `benchmarks/peers_correctness.py`. A check is one result of one case at one",
        f"slope; wrong is an error above {WRONG:.0%} or NaN, imprecise one above the limit of the",
        "dtype (outputs / gradients: "
        + "; ".join(f"{name} {o:g} / {g:g}" for name, (o, g) in LIMITS.items())
        + ").",
        "",
        ", ".join(f"{name} {value}" for name, value in versions.items()) + ".",
        "",
        "| who | result | dtype | checks | wrong | imprecise | worst error | at | wrong at slopes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entries in found.items():
        for result, by_dtype in tallies(entries).items():
            for dtype, counts in by_dtype.items():
                slopes = ", ".join(f"{slope:g}" for slope in counts.wrong_slopes) or "-"
                cells = (
                    *(name, result, dtype, counts.checks, counts.wrong, counts.imprecise),
                    *(_number(counts.worst), counts.example, slopes),
                )
                lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    for title, kind in (("Not offered", "refused"), ("Raised an error", "raised")):
        lines += ["", f"## {title}", ""]
        reasons = [(name, why) for name, e in found.items() for why in _reasons(e, kind)]
        lines += [f"- {name}: {why}" for name, why in reasons] or ["- nothing"]
    left = [
        (name, entry["left_out"]) for name, e in found.items() for entry in e if "left_out" in entry
    ]
    if left:
        lines += ["", "## Not run", "", *(f"- {name}: {why}" for name, why in left)]
    return "\n".join(lines) + "\n"
