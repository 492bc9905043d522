"""`transnormer bench`: how fast this machine runs the package."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transnormer.cli import common

if TYPE_CHECKING:
    from transnormer.bench.train import StepTimes

app = typer.Typer(
    name="bench", help="Measure speed on this machine.", no_args_is_help=True, add_completion=False
)


@app.callback()
def _group() -> None:
    """Keep `bench train` a command of its own while it is the only one."""


@app.command("train")
def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="What would be trained.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a key of the file, e.g. train.compile=true; may be repeated.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates that are timed.")] = 10,
    warmup: Annotated[int, typer.Option(help="Updates before that.")] = 3,
    as_json: common.Json = False,
) -> None:
    """Time the updates of a run on random tokens, and show where the time goes.

    Beside each part stands its floor: the arithmetic at the device's peak, or the bytes at its
    memory's rate, whichever takes longer. Nothing is written.
    """
    from transnormer.bench.train import bench_train
    from transnormer.train.recipe import read_run

    found = bench_train(read_run(run, overrides or []), steps=steps, warmup=warmup)
    for line in describe(found):
        common.write_line(line)
    if as_json:
        common.print_json(facts(found))


def describe(found: "StepTimes") -> list[str]:
    """What was found as lines."""
    peak, where = found.peak, "measured here" if found.peak_measured else "data sheet"
    memory = "" if found.memory is None else f"  {found.memory / 1e9:.2f} GB"
    mfu = "" if found.mfu is None else f"  MFU {found.mfu:.1%}"
    lines = [
        f"{found.device}, {found.precision}: {peak.flops(found.precision) / 1e12:.4g} Tflop/s, "
        f"{peak.bandwidth / 1e9:.4g} GB/s ({where})",
        f"{found.tokens:,} tokens a step: {found.milliseconds:,.1f} ms, "
        f"{found.tokens_per_second:,.0f} tokens/s{mfu}{memory}; first step "
        f"{found.first_step:.1f} s",
        f"{'part':<20}{'ms/step':>10}{'share':>8}{'floor ms':>10}{'x floor':>9}",
    ]
    total = sum(part.milliseconds for part in found.parts) or 1.0
    for part in found.parts:
        times = f"{part.milliseconds / part.floor:9.1f}" if part.floor else f"{'-':>9}"
        lines.append(
            f"{part.part:<20}{part.milliseconds:10.2f}{part.milliseconds / total:8.1%}"
            f"{part.floor:10.2f}{times}"
        )
    return lines


def facts(found: "StepTimes") -> dict[str, Any]:
    """What was found, for machines."""
    return {
        **found._asdict(),
        "peak": found.peak._asdict(),
        "parts": [part._asdict() for part in found.parts],
    }
