"""Claim: on a CPU the chunked form costs the same per token at every length, and beats the others.

Compares the forms of transnormer.ops.linear_attention with the constant decay of TransNormerLLM:
the chunked form, the first paper's quadratic tiles, the whole masked matrix, the token loop; and
the chunked form with each other kind of decay. Prints a table; the last line is JSON, which also
goes to benchmarks/results/op_cpu.json.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor

from transnormer.ops import linear_attention
from transnormer.ops.decay import tnl_log_decay
from transnormer.ops.linear_attention.reference import quadratic

LENGTHS = [512, 1024, 2048, 4096, 8192, 16_384, 32_768]


class Form(NamedTuple):
    """A form with the longest sequences it is given: beyond them memory or minutes run out."""

    name: str
    decay: str
    longest_forward: int
    longest_backward: int


FORMS = [
    Form("chunked", "constant", 32_768, 32_768),
    Form("chunked", "none", 32_768, 32_768),
    Form("chunked", "token", 32_768, 32_768),
    Form("chunked", "key", 32_768, 32_768),
    Form("lightning1", "constant", 16_384, 2048),
    Form("quadratic", "constant", 4096, 2048),
    Form("reference", "constant", 32_768, 2048),
]


def make_inputs(form: Form, seq: int, heads: int, dim: int, grad: bool) -> list[Tensor | None]:
    """q, k, v and log_decay of one row, leaves if gradients are wanted."""
    q, k, v = (torch.randn(1, seq, heads, dim) for _ in range(3))
    log_decay = {
        "none": lambda: None,
        "constant": lambda: tnl_log_decay(heads, 1, 24),
        "token": lambda: -torch.rand(1, seq, heads),
        "key": lambda: -torch.rand(1, seq, heads, dim),
    }[form.decay]()
    # A constant decay is not trained; a gate is.
    gated = log_decay is not None and log_decay.dim() > 1
    return [
        x if x is None else x.requires_grad_(grad and (gated or x is not log_decay))
        for x in (q, k, v, log_decay)
    ]


def make_call(form: Form, inputs: list[Tensor | None], grad: bool) -> Callable[[], None]:
    """One forward pass, or one forward and backward pass."""
    q, k, v, log_decay = inputs
    assert q is not None
    assert k is not None
    assert v is not None

    def run() -> Tensor:
        if form.name == "quadratic":
            return quadratic(q, k, v, log_decay)
        return linear_attention(q, k, v, log_decay, implementation=form.name)[0]

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        o = run()
        torch.autograd.grad(o, leaves, torch.ones_like(o))

    return both if grad else forward


def measure(lengths: list[int], heads: int, dim: int, repeats: int) -> list[dict[str, Any]]:
    """One row a form, pass and length; rows that are left out say why."""
    rows = []
    for form in FORMS:
        for grad in (False, True):
            longest = form.longest_backward if grad else form.longest_forward
            for seq in lengths:
                row: dict[str, Any] = {
                    "form": form.name,
                    "decay": form.decay,
                    "pass": "forward+backward" if grad else "forward",
                    "seq": seq,
                }
                if seq > longest:
                    row["left_out"] = f"longer than {longest}: minutes or memory"
                else:
                    call = make_call(form, make_inputs(form, seq, heads, dim, grad), grad)
                    total = harness.seconds(call, repeats=repeats)
                    row |= {"ms": total * 1e3, "us_per_token": total / seq * 1e6}
                rows.append(row)
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How flat the chunked form is, and how far ahead of each other form at its longest length."""
    found = {(r["form"], r["decay"], r["pass"], r["seq"]): r["ms"] for r in rows if "ms" in r}
    summary = {}
    for name in ("forward", "forward+backward"):
        per_token = {
            seq: ms / seq
            for (form, decay, kind, seq), ms in found.items()
            if (form, decay, kind) == ("chunked", "constant", name)
        }
        longest, shortest = max(per_token), min(per_token)
        summary[f"chunked {name}: time per token at {longest} / at {shortest}"] = (
            per_token[longest] / per_token[shortest]
        )
        for other in ("lightning1", "quadratic", "reference"):
            lengths = [k[3] for k in found if k[0] == other and k[2] == name]
            if lengths:
                seq = max(lengths)
                summary[f"{other} / chunked, {name} at {seq}"] = (
                    found[other, "constant", name, seq] / found["chunked", "constant", name, seq]
                )
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64, help="of keys and values")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "op_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "benchmark": "op_cpu",
        "environment": harness.environment(),
        "limits": harness.measured_limits(),
        "shape": {"batch": 1, "heads": arguments.heads, "dim": arguments.dim, "dtype": "float32"},
    }
    rows = measure(arguments.lengths, arguments.heads, arguments.dim, arguments.repeats)
    result |= {"rows": rows, "summary": summarise(rows)}
    harness.print_table(
        ("form", "decay", "pass", "seq", "ms", "us/token"),
        [
            (
                r["form"],
                r["decay"],
                r["pass"],
                r["seq"],
                f"{r['ms']:.1f}",
                f"{r['us_per_token']:.2f}",
            )
            for r in rows
            if "ms" in r
        ],
    )
    for name, value in result["summary"].items():
        print(f"{name}: {value:.2f}")
    harness.publish(result, arguments.output)


if __name__ == "__main__":
    main()
