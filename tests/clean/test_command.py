"""`transnormer clean` from the command line."""

import json
import sys
from pathlib import Path

import pytest
from clean_cases import prose, write_lines

from transnormer.cli.app import FAILURE, USAGE, run


def toml(tmp_path: Path, text: str = "") -> str:
    write_lines(tmp_path / "in.jsonl", [{"id": 1, "text": prose(1)}, {"id": 2, "text": "short"}])
    path = tmp_path / "run.toml"
    path.write_text(
        f'[input]\npath = "{tmp_path}/in.jsonl"\n[output]\ndir = "{tmp_path}/out"\n{text}'
    )
    return str(path)


def test_the_command_cleans_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["clean", toml(tmp_path), "--set", "executor.workers=1", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 documents read, 1 kept, 1 dropped, 0 quarantined" in lines[-2]
    facts = json.loads(lines[-1])
    assert (facts["read"], facts["kept"], facts["dropped"]) == (2, 1, 1)
    assert Path(facts["report"]).is_file()


def test_a_mistake_is_one_line_and_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["clean", toml(tmp_path, "[dedup]\nband = 3\n")]) == USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: dedup.band is an unknown key")
    assert error.count("\n") == 1


def test_without_the_extra_the_command_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("transnormer.clean")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.setitem(sys.modules, "datatrove.executor.base", None)
    assert run(["clean", toml(tmp_path)]) == FAILURE
    assert "pip install 'transnormer[clean]'" in capsys.readouterr().err
