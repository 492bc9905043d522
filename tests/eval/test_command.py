"""`transnormer eval --tasks`: what it prints and writes, and its one-line refusals."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_cases import byte_model, write_tasks

from transnormer.cli.app import run
from transnormer.eval import perplexity, scorer
from transnormer.eval.metrics import Figure
from transnormer.eval.scorer import evaluate_task
from transnormer.models import checkpoint as checkpoints


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer, and the files of tasks."""
    folder = tmp_path_factory.mktemp("workshop")
    model, tokenizer = byte_model()
    checkpoints.save(model, folder / "model")
    tokenizer.save(folder / "model")
    write_tasks(folder / "data")
    return folder


@pytest.fixture
def inside(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, entered."""
    monkeypatch.chdir(workshop)
    return workshop


def test_the_object_names_model_versions_and_settings(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    options = ["--data", "data", "--limit", "3", "--num-fewshot", "1", "--batch-size", "2"]
    line = ["eval", "model", "--tasks", "piqa, cmmlu", *options, "--json", "--output", str(output)]
    assert run(line) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(output.read_text()) == facts
    model, tokenizer = byte_model()
    assert facts["model"]["fingerprint"] == model.fingerprint()
    assert facts["model"]["tokenizer"] == tokenizer.fingerprint
    assert set(facts["versions"]) == {"python", "transnormer", "torch"}
    assert facts["settings"]["tasks"] == ["piqa", "cmmlu"]
    assert facts["settings"]["num_fewshot"] == 1
    for name in ("piqa", "cmmlu"):
        result = evaluate_task(model, tokenizer, name, data=Path("data"), limit=3, num_fewshot=1)
        assert facts["results"][name] == result.as_json()


def test_recall_suites_run_beside_tasks(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "data", "--limit", "2", "--lengths", "256,128", "--seed", "3"]
    assert run(["eval", "model", "--tasks", "copa,mqar,copying", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["copa"] * 3
    assert " +- " in lines[0]
    assert [line.split()[0] for line in lines if line.startswith("  ")] == ["128", "256"] * 2


def test_one_task_has_a_path_of_its_own(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = "copa=data/copa.jsonl.xz"
    assert run(["eval", "model", "--tasks", "copa", "--data", place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["copa"]["items"] == 3


def test_a_text_is_written_too(inside: Path, tmp_path: Path) -> None:
    output = tmp_path / "score.json"
    text = "data/wikitext2_test.raw.txt"
    assert run(["eval", "model", "--text", text, "--output", str(output)]) == 0
    assert set(json.loads(output.read_text())) == {
        "tokens",
        "bytes",
        "nats_per_token",
        "bits_per_byte",
    }


def test_texts_are_read_side_by_side_as_asked(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups: list[int] = []
    score_group = perplexity._score_group

    def watched(model: Any, documents: list[Any], *rest: Any) -> Any:
        groups.append(len(documents))
        return score_group(model, documents, *rest)

    monkeypatch.setattr(perplexity, "_score_group", watched)
    Path("lines.jsonl").write_text('{"text": "abc"}\n' * 5)
    assert run(["eval", "model", "--text", "lines.jsonl", "--batch-size", "2"]) == 0
    assert groups == [2, 2, 1]


def test_a_figure_beyond_float_is_null(
    inside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(scorer.metrics, "perplexity", lambda values: Figure(math.inf, math.nan))
    output = tmp_path / "results.json"
    line = ["eval", "model", "--tasks", "lambada_openai", "--data", "data", "--json"]
    assert run([*line, "--output", str(output)]) == 0
    for text in (capsys.readouterr().out.splitlines()[-1], output.read_text()):
        found = json.loads(text, parse_constant=pytest.fail)["results"]["lambada_openai"]
        assert found["perplexity"] is None
        assert found["perplexity_stderr"] is None


@pytest.mark.parametrize("options", [["--tasks", name] for name in ("piqa", "wikitext", "mqar")])
def test_a_broken_model_has_no_figures(
    options: list[str], inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = byte_model()
    torch.nn.init.constant_(model.embedding.weight, math.nan)
    checkpoints.save(model, tmp_path / "broken")
    tokenizer.save(tmp_path / "broken")
    where = ["--data", "data", "--lengths", "64"] if "mqar" in options else ["--data", "data"]
    for asked in ([*options, *where], ["--text", "data/wikitext2_test.raw.txt"]):
        assert run(["eval", str(tmp_path / "broken"), *asked]) == 2
        assert "a log-likelihood is nan; expected a number" in capsys.readouterr().err


MISTAKES = {
    "neither": ([], "expected one of --text and --tasks"),
    "both": (["--text", "a", "--tasks", "piqa"], "Both are given"),
    "an unknown task": (["--tasks", "pica"], "--tasks names pica; expected some of boolq"),
    "no task": (["--tasks", ","], "expected names with commas"),
    "no data": (["--tasks", "piqa"], "pass --data DIR"),
    "no file": (["--tasks", "mmlu", "--data", "data"], "holds no mmlu or mmlu.jsonl"),
    "two directories": (
        ["--tasks", "piqa", "--data", "data", "--data", "more"],
        "expected one directory",
    ),
    "options beside a text": (
        ["--text", "data", "--data", "data", "--limit", "3"],
        "--data, --limit stands beside --text",
    ),
    "no directory": (
        ["--text", "data", "--output", "absent/results.json"],
        "expected a file in a directory that exists; make absent",
    ),
    "limit": (["--tasks", "piqa", "--limit", "0"], "--limit is 0"),
    "batch": (["--tasks", "piqa", "--batch-size", "0"], "--batch-size is 0"),
    "batch of texts": (["--text", "data", "--batch-size", "0"], "--batch-size is 0"),
    "a directory for output": (
        ["--text", "data", "--output", "data"],
        "data, a directory; expected a",
    ),
    "lengths of the harness": (
        ["--tasks", "mqar", "--lengths", "64", "--harness"],
        "--lengths is given beside --harness",
    ),
    "data of no task": (
        ["--tasks", "piqa", "--data", "data", "--data", "copa=absent"],
        "--data names copa; expected the tasks that are run: piqa",
    ),
    "lengths": (["--tasks", "mqar", "--lengths", "1k"], "--lengths is '1k'"),
    "lengths of files": (["--tasks", "piqa", "--lengths", "256"], "expected a recall suite"),
    "examples of recall": (["--tasks", "mqar", "--num-fewshot", "2"], "--num-fewshot is 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(inside: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = MISTAKES[name]
    assert run(["eval", "model", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_the_harness_says_how_to_install_it(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "model", "--tasks", "piqa", "--harness"]) == 1
    assert "pip install 'transnormer[eval]'" in capsys.readouterr().err
