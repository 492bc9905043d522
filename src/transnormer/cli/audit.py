"""`transnormer audit`: whether a layout computes what one process computes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transnormer.cli import common
from transnormer.cli.train import Overrides

if TYPE_CHECKING:
    from transnormer.train.audit import Audit
    from transnormer.train.recipe import RunConfig


def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="What would be trained.")],
    ranks: Annotated[
        int | None,
        typer.Option(help="Processes to start here; not under torchrun.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    tolerance: Annotated[
        float, typer.Option(help="The most of a relative deviation in float32.")
    ] = 1e-3,
    show: Annotated[int, typer.Option(help="So many gradients, the worst first.")] = 20,
    as_json: common.Json = False,
) -> None:
    """Compare one batch's loss and gradients on one process and on the run's layout.

    Exit code 1 where they differ by more than the tolerance: the layout is wrong. In float32 without
    dropout. The whole model must fit on one device; --set model.num_layers=2 makes a large one
    small. Nothing is written.
    """
    from transnormer.parallel import current_world
    from transnormer.train.recipe import read_run

    if not tolerance > 0:
        raise ValueError(f"--tolerance is {tolerance}; expected a number above 0")
    config, started = read_run(run, overrides or []), current_world().world_size
    if started == 1 and (ranks is None or ranks < 2):
        raise ValueError(
            f"--ranks is {ranks}; expected the processes of the layout, at least 2; pass --ranks, or "
            "start with torchrun"
        )
    if started > 1 and ranks not in (None, started):
        raise ValueError(
            f"--ranks is {ranks}; expected {started}, as torchrun started; leave it out"
        )
    found = _found(config, ranks or started, started, tolerance)
    if current_world().rank == 0:
        # One process of many speaks.
        _tell(found, show, as_json=as_json)
    if found.wrong:
        raise typer.Exit(1)


def _tell(found: "Audit", show: int, *, as_json: bool) -> None:
    for line in describe(found, show):
        common.write_line(line)
    if as_json:
        facts = found._asdict()
        facts["deviations"] = [deviation._asdict() for deviation in found.deviations]
        common.print_json({**facts, "wrong": [deviation.name for deviation in found.wrong]})


def _found(config: "RunConfig", ranks: int, started: int, tolerance: float) -> "Audit":
    from transnormer.parallel.launch import call_on_ranks
    from transnormer.train.audit import run_audit

    if started > 1:
        return run_audit(config, tolerance=tolerance)
    # Before any process is started.
    config.parallel.axes(ranks)
    return call_on_ranks(ranks, audit_here, config, tolerance)


def audit_here(config: "RunConfig", tolerance: float) -> "Audit":
    """What each process that the command started calls."""
    import torch

    from transnormer.train.audit import run_audit

    torch.set_num_threads(1)
    return run_audit(config, tolerance=tolerance)


def describe(found: "Audit", show: int) -> list[str]:
    """What was found as lines."""
    axes = ", ".join(f"{name} {size}" for name, size in found.parallel.items())
    lines = [f"{found.ranks} ranks ({axes}) beside one process, in float32"]
    lines.append(f"{'deviation':>10}  {'size':>10}  of")
    scalars, gradients = found.deviations[:2], found.deviations[2:]
    gradients.sort(key=lambda x: -x.deviation if x.deviation == x.deviation else -float("inf"))
    lines += [f"{x.deviation:10.2e}  {x.size:10.3e}  {x.name}" for x in scalars + gradients[:show]]
    if len(gradients) > show:
        lines.append(f"and {len(gradients) - show} gradients that deviate less")
    verdict = (
        f"wrong: {len(found.wrong)} of {len(found.deviations)} deviate by more than"
        if found.wrong
        else "right: nothing deviates by more than"
    )
    return [*lines, f"{verdict} {found.tolerance:g}"]
