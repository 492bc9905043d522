"""docs/serving.md is true: its programs run against a server."""

from pathlib import Path
from typing import Any

import pytest
from docs.code_blocks import blocks_of
from serve_cases import Server

from transnormer.cli.app import run

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_programs_of_the_page_run(server: Server) -> None:
    names: dict[str, Any] = {}
    ran = 0
    for block in blocks_of(PAGE):
        if block.language == "python":
            text = block.text.replace("http://127.0.0.1:8000", server.url)
            exec(compile(text.replace('"quickstart"', '"toy"'), str(PAGE), "exec"), names)
            ran += 1
    assert ran == 2
    names["client"].close()
    left, right = (names[name].choices[0].message.content for name in ("left", "right"))
    assert left != right


def test_the_page_names_options_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    page = PAGE.read_text(encoding="utf-8")
    for option in ("--states-mb", "--prefix-mb", "--max-body-mb", "--queue", "--allow-host"):
        assert option in page
        assert option in shown
