"""What the documentation's pages need beside mkdocs' own: formulas, links to files, help texts.

mkdocs calls the functions by their names (``hooks`` in mkdocs.yml).
"""

import html
import io
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from typer.main import get_command
from typer.testing import CliRunner

_LINK_UP = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")
_INK = "#010203"
_COMMANDS = "<!-- commands -->"


def on_config(config: Any) -> Any:
    """Let ```math blocks become pictures, which take no script; pages that the menu does not place
    are found under "More"."""
    fence = {"name": "math", "class": "math", "format": _formula}
    config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault(
        "custom_fences", []
    ).append(fence)
    docs = Path(config["docs_dir"])
    placed = set(_leaves(config["nav"]))
    names = (path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md")))
    more = [name for name in names if name not in placed]
    if more:
        config["nav"].append({"More": more})
    return config


def _leaves(nav: Any) -> Iterator[str]:
    """The pages that a menu names."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(part)


def _formula(source: str, *arguments: Any, **options: Any) -> str:
    """A block of formulas, one a line."""
    lines = (_drawn(line) for line in source.splitlines() if line.strip())
    return f'<div class="math">{"".join(lines)}</div>'


def _drawn(formula: str) -> str:
    """A formula as SVG in the colour of the text: no script, and no font of the reader's system."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "formula"}):
        font = FontProperties(size=15, math_fontfamily="cm")
        math_to_image(f"${formula}$", file, prop=font, format="svg", color=_INK)
    svg = file.getvalue().decode()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.S)
    label = html.escape(formula, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def on_page_markdown(markdown: str, *, page: Any, **context: Any) -> str:
    """Name files of the project that are no pages, and put the commands' help where it belongs."""

    def named(match: re.Match[str]) -> str:
        text, link = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link))
        outside = target.startswith("../")
        return f"{text} (`{target.removeprefix('../')}`)" if outside else match[0]

    markdown = _LINK_UP.sub(named, markdown)
    if _COMMANDS in markdown:
        markdown = markdown.replace(_COMMANDS, _help())
    return markdown


def _help() -> str:
    """The help of every command, as it prints it."""
    from transnormer.cli.app import app

    texts = []
    runner = CliRunner()
    for name, command in sorted(get_command(app).commands.items()):
        for path in [[name], *([name, part] for part in getattr(command, "commands", {}))]:
            options = {"env": {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "106"}}
            done = runner.invoke(app, [*path, "--help"], **options)
            if done.exit_code:
                raise RuntimeError(f"transnormer {' '.join(path)} --help failed: {done.output}")
            title = f"{'#' * (1 + len(path))} {' '.join(path)}"
            texts.append(f"{title}\n\n```text\n{done.output.strip()}\n```")
    return "\n\n".join(texts)
