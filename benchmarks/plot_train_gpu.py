"""Draw tokens a second of training against length, from the result of train_gpu.

    python benchmarks/plot_train_gpu.py        reads benchmarks/results/train_gpu.json

Writes docs/images/train_speed.png.
"""

from typing import Any

import plotting
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Subject in the result, label, colour, marker.
SERIES = (
    ("tnl", "TransNormerLLM, transnormer", "#1b9e77", "o"),
    ("llama", "LLaMA, transnormer (cuDNN attention)", "#d95f02", "^"),
    ("released_lightning2", "TransNormerLLM, authors' code, Lightning Attention-2", "#e7298a", "v"),
    ("released", "TransNormerLLM, authors' code", "#66a61e", "<"),
    ("hf_llama", "LLaMA, transformers (SDPA)", "#7570b3", "D"),
    ("hf_llama_compiled", "LLaMA, transformers, torch.compile", "#999999", "s"),
)


def points(result: dict[str, Any], subject: str) -> list[tuple[int, float]]:
    """(tokens of a row, tokens a second) of one subject, ascending."""
    found = []
    for name, row in result["rows"].items():
        if name.partition("@")[0] == subject and "tokens_per_second" in row:
            found.append((row["seq"], row["tokens_per_second"]))
    return sorted(found)


def draw(result: dict[str, Any]) -> tuple[Figure, int]:
    """The picture, and how many lines it has."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lines, lengths = 0, set()
    for subject, label, colour, marker in SERIES:
        line = points(result, subject)
        if line:
            # The row that is trained in segments is measured once and belongs to the line.
            axes.plot(*zip(*line), label=label, color=colour, marker=marker, markersize=5)
            lengths |= {seq for seq, _ in line}
            lines += 1
    ticks = sorted(lengths)
    axes.set(xscale="log", xlabel="tokens a row", ylabel="tokens a second", ylim=(0, None))
    # Setting the scale sets ticks of its own.
    axes.set_xticks(ticks, [f"{n >> 20}M" if n >> 20 else f"{n // 1024}k" for n in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    device = result["environment"]["device"]
    axes.set_title(f"0.4 B parameters, 32,768 tokens a step or one row, {device}", fontsize=9)
    return figure, lines


def main() -> None:
    parser = plotting.parser_of(__doc__, "train_gpu.json", "train_speed.png")
    plotting.write_picture(parser.parse_args(), draw)


if __name__ == "__main__":
    main()
