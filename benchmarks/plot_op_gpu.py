"""Draw time against length, forward and backward, from the result of op_gpu.

    python benchmarks/plot_op_gpu.py        reads benchmarks/results/op_gpu.json

Writes docs/images/op_gpu.png. Rows of one shape (batch 4, 32 heads of 128) make the lines.
"""

from typing import Any

import plotting
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Name in the result, label, colour, marker.
SERIES = (
    ("softmax_cudnn", "softmax attention, cuDNN", "#999999", "s"),
    ("opennlplab", "OpenNLPLab lightning_attn", "#d95f02", "^"),
    ("fla_chunk", "flash-linear-attention, chunk", "#7570b3", "D"),
    ("ours", "transnormer", "#1b9e77", "o"),
)


def points(
    result: dict[str, Any], name: str, direction: str, batch: int, heads: int, dim: int
) -> list[tuple[int, float]]:
    """(tokens, milliseconds) of one line, ascending."""
    found = []
    for row in result["rows"]:
        shape = row["shape"]
        if row["dtype"] != "bf16" or (shape["batch"], shape["heads"], shape["dim"]) != (
            batch,
            heads,
            dim,
        ):
            continue
        if name == "floor":
            figures = row["hbm_floor"]
        elif name == "ours":
            figures = row.get("ours", {}).get("first_layer", {})
        else:
            figures = row["peers"].get(name, {})
        if f"{direction}_ms" in figures:
            found.append((shape["seq"], figures[f"{direction}_ms"]))
    return sorted(found)


def draw(result: dict[str, Any], batch: int, heads: int, dim: int) -> tuple[Figure, int]:
    """The picture, and how many lines it has."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    lines = 0
    for panel, direction in zip(panels, ("forward", "backward")):
        for name, label, colour, marker in SERIES:
            line = points(result, name, direction, batch, heads, dim)
            if line:
                panel.plot(*zip(*line), label=label, color=colour, marker=marker, markersize=4)
                lines += 1
        floor = points(result, "floor", direction, batch, heads, dim)
        if floor:
            label = "each tensor moved once"
            panel.plot(*zip(*floor), label=label, color="black", linestyle=":", linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel="tokens a sequence", title=direction)
        # Setting the scale sets ticks of its own.
        panel.set_xticks([tokens for tokens, _ in floor], [f"{n // 1024}k" for n, _ in floor])
        panel.set_xticks([], minor=True)
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize=8, frameon=False)
    device = result["environment"]["device"]
    figure.suptitle(f"batch {batch}, {heads} heads of {dim}, bfloat16, {device}", fontsize=10)
    return figure, lines


def main() -> None:
    parser = plotting.parser_of(__doc__, "op_gpu.json", "op_gpu.png")
    parser.add_argument("--shape", type=int, nargs=3, default=[4, 32, 128], help="batch heads dim")
    options = parser.parse_args()
    plotting.write_picture(options, lambda result: draw(result, *options.shape))


if __name__ == "__main__":
    main()
