"""The benchmark of training without a GPU: rows, settings, verdicts, a dry run, the picture."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from transnormer.train.recipe import read_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the benchmarks' folder, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__(name)


def test_every_row_has_a_name_of_its_own_and_a_valid_run(monkeypatch: pytest.MonkeyPatch) -> None:
    train_gpu = module("train_gpu", monkeypatch)
    subjects = module("train_gpu_subjects", monkeypatch)
    rows = (*train_gpu.rows_of_the_run(), *train_gpu.RELEASED_ROWS)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        config = subjects.config_of(row, dry=False)
        assert config.train.tokens_per_step == row.tokens
        assert subjects.config_of(row, dry=True).train.compile is False
    promised = {*train_gpu.TARGETS, *train_gpu.MEMORY_GB, *sum(train_gpu.SHARES, ())}
    assert promised <= set(names)


def test_verdicts_compare_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    train_gpu = module("train_gpu", monkeypatch)
    made = train_gpu.verdicts(
        {
            "tnl@2048": {
                "step_ms": 1.0,
                "tokens_per_second": 200_000.0,
                "peak_gb": 33.0,
                "first_step_s": 20.0,
            },
            "llama@2048": {"step_ms": 1.0, "tokens_per_second": 100_000.0},
            "hf_llama@2048": {"error": "OutOfMemoryError"},
        }
    )
    assert made["tnl@2048 tokens/s"]["met"]
    assert made["tnl@2048 over llama@2048"] == {"value": 2.0, "at_least": 1.05, "met": True}
    assert made["tnl@2048 GB"] == {"value": 33.0, "at_most": 32.0, "met": False}
    assert len(made) == 4


def test_the_rows_are_those_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    train_gpu = module("train_gpu", monkeypatch)
    recipe = read_run(BENCHMARKS.parent / "recipes" / "tnl_385m.toml").train.model_dump()
    for setting in train_gpu.FAST:
        key, _, value = setting.removeprefix("train.").partition("=")
        if setting != train_gpu.GRAPH:
            assert str(recipe[key]).lower() == value, key


def test_an_earlier_row_of_other_settings_stays_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train_gpu = module("train_gpu", monkeypatch)
    rows = {row.name: train_gpu.facts_of(row) for row in train_gpu.rows_of_the_run()}
    names = ("tnl@2048", "tnl@8192", "llama@2048")
    earlier = {name: {"step_ms": 1.0} | rows[name] for name in names}
    earlier["tnl@8192"]["settings"] = ["train.compile=true"]
    earlier["tnl_gone@2048"] = earlier["llama@2048"]
    earlier["llama@2048"]["left_out"] = "the seconds were spent"
    (tmp_path / "result.json").write_text(json.dumps({"environment": {}, "rows": earlier}))
    assert list(train_gpu.harness.rows_of_an_earlier(tmp_path / "result.json", rows)) == [
        "tnl@2048"
    ]


@pytest.mark.slow
def test_a_dry_run_writes_rows_and_a_picture(tmp_path: Path) -> None:
    result, image = tmp_path / "result.json", tmp_path / "speed.png"
    command = [sys.executable, str(BENCHMARKS / "train_gpu.py"), "--device", "cpu", "--steps", "1"]
    command += ["--output", str(result)]
    calls = (("abc", "hf_llama@2048", "tnl@8192"), ("def", "tnl@2048", "tnl@8192"))
    for commit, *rows in calls:
        own = ["--rows", *rows, "--gpus", "0", "1", "--commit", commit]
        own += ["--add", str(result)] if result.exists() else []
        run = subprocess.run(
            [*command, *own], capture_output=True, text=True, timeout=100, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(result.read_text(encoding="utf-8"))
    assert list(found["rows"]) == ["tnl@2048", "tnl@8192", "hf_llama@2048"]
    assert found["rows"]["hf_llama@2048"]["environment"]["commit"] == "abc"
    assert "environment" not in found["rows"]["tnl@8192"]
    assert found["failures"] == []
    assert "dry_run" in found
    assert all(row["tokens_per_second"] > 0 for row in found["rows"].values())
    command = [sys.executable, str(BENCHMARKS / "plot_train_gpu.py"), "--result", str(result)]
    run = subprocess.run(
        [*command, "--output", str(image)], capture_output=True, text=True, timeout=100, check=True
    )
    assert json.loads(run.stdout.splitlines()[-1])["lines"] == 2
    assert image.stat().st_size > 1000
