"""A run's configuration: what is refused, and how it says so."""

from pathlib import Path
from typing import Any

import pytest

from transnormer.clean.config import make_clean_config, read_clean_config

BASE: dict[str, Any] = {"input": {"path": "x"}, "output": {"dir": "y"}}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"dedup": {"bands": 5}}, "these find 0.6"),
        ({"dedup": {"bands": 21}}, "expected at most 20"),
        ({"dedup": {"keep_below": 0.9}}, "keep_below is 0.9"),
        ({"executor": {"workers": 0}}, "workers is 0"),
        ({"executor": {"kind": "slurm"}}, "partition is ''"),
        ({"preset": "unknown"}, "preset is 'unknown'"),
        ({"quality": {"min_word": 3}}, "quality.min_word is an unknown key"),
        ({"rules": {"pii": 1}}, "rules.pii is 1"),
    ],
)
def test_a_mistake_is_named(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_clean_config({**BASE, **tables})


def test_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[input]\npath = "x"\n[output]\ndir = "y"\n')
    config = read_clean_config(path, ["dedup.near=false", "output.dir=z"])
    assert (config.dedup.near, config.output.dir, config.preset) == (False, "z", "paper")


def test_bands_that_find_too_few_are_no_matter_without_near() -> None:
    assert not make_clean_config({**BASE, "dedup": {"near": False, "bands": 2}}).dedup.near


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "recipes").glob("clean_*.toml")),
    ids=lambda path: path.stem,
)
def test_recipes_are_valid(path: Path) -> None:
    assert read_clean_config(path, ["input.path=x"]).output.dir
