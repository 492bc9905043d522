"""The documentation builds as a site, without a warning and without a network."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a browser fetches by itself when it shows a page.
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(https?:|//)"
    r"|<link[^>]*rel=[\"']?(?:stylesheet|icon|preconnect)[^>]*href=[\"']?(https?:|//)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_menu(site: Path) -> None:
    docs = ROOT / "docs"
    menu = set(re.findall(r'href="([\w/]+)\.html"', (site / "index.html").read_text("utf-8")))
    pages = {x.relative_to(docs).with_suffix("").as_posix() for x in docs.rglob("*.md")}
    assert pages <= menu
    assert 'href="../huggingface.html"' in (site / "reference" / "index.html").read_text("utf-8")


def test_files_that_are_no_pages_are_named(site: Path) -> None:
    assert "family_gpu.json (<code>benchmarks/results/family_gpu.json</code>)" in re.sub(
        r"\s+", " ", (site / "models.html").read_text("utf-8")
    )


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    built = list(site.rglob("*.html"))
    assert len(built) > 20
    assert [x.name for x in built if _FETCHED.search(x.read_text("utf-8"))] == []
    styles = [x.read_text("utf-8") for x in site.rglob("*.css")]
    assert not any(re.search(r"@import|url\([\"']?(?:https?:)?//", text) for text in styles)


def test_formulas_are_drawn_without_scripts(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        blocks = re.findall(r"^```math\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
        formulas = [line for block in blocks for line in block.splitlines()]
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        built = (site / name).read_text("utf-8")
        drawn = re.findall(r'<svg role="img" aria-label="([^"]+)"', built)
        assert [html.unescape(x) for x in drawn] == formulas, name
        # The colour of the text, in both schemes.
        assert "#010203" not in built


def test_the_reference_has_the_public_names(site: Path) -> None:
    reference = "".join(x.read_text("utf-8") for x in (site / "reference").glob("*.html"))
    for name in ("Decoder", "DecoderState", "linear_attention", "generate", "Engine", "eos"):
        assert re.search(rf'id="transnormer\.[\w.]*{name}"', reference), name
    commands = (site / "reference" / "commands.html").read_text("utf-8")
    for name in ("train", "generate", "convert", "info", "tokenize-train"):
        assert f'id="{name}"' in commands, name
