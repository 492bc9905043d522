"""`transnormer plan`: layouts of a model on many devices, before any is paid for."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from transnormer.cli import common

if TYPE_CHECKING:
    from transnormer.parallel.plan import Plan


def plan(
    model: Annotated[str, typer.Option(help="A published size, as tnl-175b.")],
    gpus: Annotated[int, typer.Option(help="Devices in all.")],
    gpu_mem: Annotated[float, typer.Option(help="GB of a device.")] = 80.0,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 8192,
    node: Annotated[int, typer.Option(help="Devices of one host.")] = 8,
    peak: Annotated[float, typer.Option(help="Tflop/s of a device in bfloat16.")] = 989.4,
    efficiency: Annotated[float, typer.Option(help="Share of the peak that products reach.")] = 0.5,
    inside: Annotated[float, typer.Option(help="GB/s that a device sends within its host.")] = 300,
    between: Annotated[float, typer.Option(help="GB/s that a device sends between hosts.")] = 40,
    show: Annotated[int, typer.Option(help="So many layouts.")] = 10,
    exact: Annotated[
        bool, typer.Option("--exact", help="Run the best on fake tensors.", metavar="")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """List the layouts that fit, the fastest first: memory, communication, time of a step, MFU."""
    from transnormer.models import zoo
    from transnormer.parallel.plan import GIB, Machine, layouts

    zoo.check_name(model)
    config = zoo.get(model)
    machine = Machine(gpu_mem * 1e9, peak * 1e12, efficiency, node, inside * 1e9, between * 1e9)
    plans = layouts(config, gpus, seq, machine)
    if not plans:
        raise ValueError(
            f"{model} has no layout on {gpus} devices of {gpu_mem:g} GB with sequences of {seq} "
            "tokens; expected one that fits; take more devices, or shorter sequences"
        )
    common.write_line(
        "dp_replicate  dp_shard  sp  tp  rows  checkpointing  GiB a rank  GiB sent a step  "
        "s a step  tokens a step  MFU"
    )
    for found in plans[:show]:
        common.write_line(_line(found))
    facts: dict[str, Any] = {"layouts": [_facts(found) for found in plans[:show]]}
    if exact:
        measured = _measure(config, seq, plans[0])
        shown = "  ".join(f"{name} {size / GIB:.2f}" for name, size in measured.items() if size)
        common.write_line(f"on fake tensors, GiB: {shown}")
        facts["exact"] = measured
    if as_json:
        common.print_json(facts)


def _line(found: "Plan") -> str:
    from transnormer.parallel.plan import GIB

    axes = found.axes
    return (
        f"{axes.dp_replicate:12d}  {axes.dp_shard:8d}  {axes.sp:2d}  {axes.tp:2d}  "
        f"{found.rows:4d}  {found.checkpointing:>13}  {found.memory.total / GIB:10.1f}  "
        f"{sum(found.sent.values()) / GIB:15.1f}  {found.seconds:8.2f}  "
        f"{found.tokens:13,d}  {found.mfu:.0%}"
    )


def _facts(found: "Plan") -> dict[str, Any]:
    return {
        **found.axes._asdict(),
        "rows": found.rows,
        "checkpointing": found.checkpointing,
        "memory": {**found.memory._asdict(), "total": found.memory.total},
        "sent": found.sent,
        "seconds": found.seconds,
        "tokens": found.tokens,
        "mfu": found.mfu,
    }


def _measure(config: Any, seq: int, found: "Plan") -> dict[str, float]:
    """The memory of a layout by the tracker."""
    from transnormer.parallel.plan_exact import measured_memory

    own = found.rows * -(-seq // found.axes.sp)
    axes = ", ".join(f"{name} {size}" for name, size in found.axes._asdict().items())
    common.write_line(f"running {axes}, checkpointing {found.checkpointing}")
    return measured_memory(config, found.axes, own, found.checkpointing)
