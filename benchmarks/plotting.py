"""What the scripts share that draw a result: their options, and the picture on disk."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def parser_of(description: str | None, result: str, image: str) -> argparse.ArgumentParser:
    """Options for the names of a result and of the picture of it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, default=harness.RESULTS / result)
    parser.add_argument("--output", type=Path, default=IMAGES / image)
    return parser


def write_picture(
    options: argparse.Namespace, draw: Callable[[dict[str, Any]], tuple[Figure, int]]
) -> None:
    """Draw the result, write the picture, and print how many lines it has."""
    figure, lines = draw(json.loads(options.result.read_text(encoding="utf-8")))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=130)
    plt.close(figure)
    print(json.dumps({"output": str(options.output), "lines": lines}))
