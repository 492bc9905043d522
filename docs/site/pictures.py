"""Draws the pictures of docs/concepts.md, each for light and dark pages: python docs/site/pictures.py

Every number in them is computed here by the package: decays by its rule, states by its op, bytes by
its cost model.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from transnormer.models import zoo
from transnormer.models.cost import ModelCost
from transnormer.ops import decay, linear_attention

IMAGES = Path(__file__).parents[1] / "images"
SCHEMES = {"light": "#24292f", "dark": "#d5dae1"}
BLUE, ORANGE, GREEN = "#3b82c4", "#e0862f", "#3f9c6d"


def growth(figure: Figure) -> None:
    """Bytes that a sequence needs over its length: a constant state and a cache."""
    axes = figure.add_subplot()
    length = np.logspace(2, 6, 60).astype(int)
    for name, color, label in (
        ("tnl-7b", BLUE, "TransNormerLLM 7B: a state"),
        ("llama-7b", ORANGE, "LLaMA 7B: keys and values"),
    ):
        cost = ModelCost.of(zoo.get(name), torch.bfloat16)
        axes.loglog(length, [cost.state_bytes(int(n)) / 1e9 for n in length], color=color, lw=2.5)
        place = 60 if name == "tnl-7b" else 36
        y = cost.state_bytes(int(length[place - 1])) / 1e9
        at = (length[place - 1], y)
        axes.annotate(label, at, (-6, 8), textcoords="offset points", color=color, ha="right")
    axes.set(xlabel="tokens read", ylabel="GB a sequence", xlim=(100, 1e6))
    axes.grid(alpha=0.25)


def state(figure: Figure) -> None:
    """One step: the old state decays, the outer product of key and value joins it, the query reads."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 12, 1, 8, generator=generator) for _ in range(3))
    log_decay = torch.tensor([-0.25])
    before = linear_attention(q[:, :11], k[:, :11], v[:, :11], log_decay)[1][0, 0]
    after = linear_attention(q, k, v, log_decay)[1][0, 0]
    key, value, query = k[0, 11, 0], v[0, 11, 0], q[0, 11, 0]
    parts = (
        (0.0, before, "$S_{t-1}$", (8, 8)),
        (9.6, key[:, None], "$k_t^\\top$", (1, 8)),
        (11.2, value[None], "$v_t$", (8, 1)),
        (21.4, after, "$S_t$", (8, 8)),
        (31.4, query[None], "$q_t$", (8, 1)),
        (41.0, (query @ after)[None], "$o_t=q_tS_t$", (8, 1)),
    )
    axes = figure.add_subplot()
    for left, values, name, (width, height) in parts:
        bottom = 4 - height / 2
        axes.imshow(
            values,
            cmap="RdBu_r",
            vmin=-4,
            vmax=4,
            extent=(left, left + width, bottom, bottom + height),
            interpolation="nearest",
        )
        outline = Rectangle((left, bottom), width, height, fill=False, lw=0.8, ec="0.5")
        axes.add_patch(outline)
        axes.text(left + width / 2, bottom + height + 0.5, name, ha="center", va="bottom", size=12)
    for x, sign in ((-1.1, "$\\lambda$"), (8.8, "+"), (20.3, "="), (30.4, ""), (40.2, "→")):
        axes.text(x, 4, sign, ha="center", va="center", size=14)
    axes.set(xlim=(-2.2, 50), ylim=(-0.6, 10.2))
    axes.axis("off")


def chunks(figure: Figure) -> None:
    """The triangle of all pairs of tokens: tiles on the diagonal, and what passes through states."""
    size, chunk = 24, 6
    quadratic, linear = figure.subplots(1, 2)
    row, column = np.indices((size, size))
    pairs = np.where(column <= row, 1.0, np.nan)
    tiles = np.where(row // chunk == column // chunk, pairs, np.nan)
    quadratic.imshow(pairs, cmap=ListedColormap([ORANGE]), extent=(0, size, size, 0))
    quadratic.set_title(f"every pair: {size * (size + 1) // 2} products", size=11)
    linear.imshow(tiles, cmap=ListedColormap([ORANGE]), extent=(0, size, size, 0))
    products = size * (chunk + 1) // 2
    linear.set_title(f"{products} products, and {size // chunk - 1} states", size=11)
    for i in range(1, size // chunk):
        box = Rectangle((0, i * chunk), i * chunk, chunk, fc=BLUE, alpha=0.3, lw=0)
        linear.add_patch(box)
        linear.text(i * chunk / 2, (i + 0.5) * chunk, f"$S_{i}$", ha="center", va="center", size=13)
    for axes in (quadratic, linear):
        axes.set(xlabel="keys and values", ylabel="queries", xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)


def decay_by_layer(figure: Figure) -> None:
    """How many tokens a head of each layer remembers: until a weight has fallen to 1/e."""
    layers, heads = 24, 8
    reach = np.array(
        [
            (-1.0 / decay.tnl_log_decay(heads, i, layers).double().clamp(max=-1e-12)).numpy()
            for i in range(layers)
        ]
    )
    axes = figure.add_subplot()
    shown = axes.imshow(np.log10(reach).T.clip(0, 4), aspect="auto", cmap="viridis", origin="lower")
    for i in (1, 8, 16, 21):
        for head in (0, 3, 7):
            number = f"{reach[i, head]:,.0f}" if reach[i, head] >= 10 else f"{reach[i, head]:.1f}"
            color = "black" if reach[i, head] > 500 else "white"
            axes.text(i, head, number, ha="center", va="center", size=8, color=color)
    axes.set(xlabel="layer", ylabel="head", xticks=range(0, layers, 4), yticks=range(heads))
    bar = figure.colorbar(shown, ax=axes, ticks=range(5))
    bar.ax.set_yticklabels(["1", "10", "100", "1,000", "10,000 and more"])
    bar.set_label("tokens until a weight is 1/e")


PICTURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "concept_growth": (growth, (6.4, 3.6)),
    "concept_state": (state, (7.6, 2.0)),
    "concept_chunks": (chunks, (7.0, 3.6)),
    "concept_decay": (decay_by_layer, (7.2, 3.4)),
}


def draw(name: str, scheme: str) -> bytes:
    """A picture as SVG; the same call gives the same bytes."""
    function, size = PICTURES[name]
    ink = SCHEMES[scheme]
    settings: dict[str, object] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
    )
    settings |= {"axes.facecolor": "none", "svg.hashsalt": name, "font.size": 10}
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        function(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="none")
    return b"\n".join(line.rstrip() for line in file.getvalue().splitlines()) + b"\n"


def main() -> None:
    """Write all of them."""
    for name in PICTURES:
        for scheme in SCHEMES:
            (IMAGES / f"{name}_{scheme}.svg").write_bytes(draw(name, scheme))


if __name__ == "__main__":
    main()
