"""Model cards: what a run read, how, and how well it did; nothing where nothing is known."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from decoder_cases import make_model, tnl_config
from huggingface_hub import ModelCard
from train_cases import run_file

from transnormer.cli.app import run
from transnormer.export.model_card import CARD, card, card_for, write_card
from transnormer.models import checkpoint


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a corpus with an absolute path."""
    folder = tmp_path_factory.mktemp("cards")
    corpus = folder / "corpus.txt"
    corpus.write_text("the sea has no end and the moon no shore\n" * 200)
    text = run_file(corpus=corpus, output=folder / "tiny", eval_every=2)
    (folder / "run.toml").write_text(text + "[optimizer]\nlr = 0.002\n")
    assert run(["train", str(folder / "run.toml")]) == 0
    return folder / "tiny"


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_a_card_holds_data_recipe_and_metrics_of_the_run(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "fine-model"
    assert run(["convert", str(run_dir), str(target), "--to", "transnormer"]) == 0
    text = (target / CARD).read_text()
    model = checkpoint.load(run_dir)
    assert f"{model.num_parameters():,}" in section(text, "Model")
    data = section(text, "Training data")
    assert "| corpus (`data.path`) | `corpus.txt` |" in data
    assert "| tokens read | 256 |" in data
    assert str(tmp_path.parent) not in text
    recipe = tomllib.loads(section(text, "Recipe").split("```toml\n")[1].split("```")[0])
    assert recipe["optimizer"]["lr"] == 0.002
    assert recipe["train"]["tokens_per_step"] == 64
    rows = [json.loads(x) for x in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert f"| 4 | {rows[-1]['loss']:.4f} | {rows[-1]['bits_per_byte']:.4f} |" in text
    assert checkpoint.load(target).fingerprint() == model.fingerprint()


def test_the_header_is_one_that_the_hub_reads(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "fine-model"
    assert run(["convert", str(run_dir), str(target), "--to", "released"]) == 0
    header = ModelCard((target / CARD).read_text()).data
    assert header.library_name == "transnormer"
    rows = [json.loads(x) for x in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert {x.metric_type: x.metric_value for x in header.eval_results} == {
        name: rows[-1][name] for name in ("loss", "bits_per_byte")
    }


def test_a_step_has_the_figures_up_to_it(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step_00000002"
    text = card("x", checkpoint.load(step), "transnormer", step, tmp_path / "run")
    assert "| tokens read | 128 |" in text
    assert "\n| 2 | " in text
    assert "\n| 4 | " not in text


def test_a_card_goes_along_where_the_source_is_no_run(tmp_path: Path) -> None:
    model, source, target = make_model(), tmp_path / "a", tmp_path / "b"
    checkpoint.save(model, source)
    write_card(source, card_for(source, model, source, "transnormer"))
    assert "nothing beside them says what they were trained on" in (source / CARD).read_text()
    (source / CARD).write_text("the author's words")
    assert run(["convert", str(source), str(target), "--to", "released"]) == 0
    assert (target / CARD).read_text() == "the author's words"


def test_a_card_survives_a_conversion_in_place(tmp_path: Path) -> None:
    source = tmp_path / "a"
    checkpoint.save(make_model(), source)
    (source / CARD).write_text("the author's words")
    assert run(["convert", str(source), str(source), "--to", "released"]) == 0
    assert (source / CARD).read_text() == "the author's words"


def test_a_step_is_known_as_one_from_inside_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir / "checkpoints" / "step_00000004")
    assert run(["convert", ".", str(tmp_path / "a"), "--to", "transnormer"]) == 0
    assert "| tokens read | 256 |" in (tmp_path / "a" / CARD).read_text()


def test_no_path_of_the_machine_is_told(run_dir: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"prompt": x, "completion": "y"}) + "\n" for x in "abc"))
    (tmp_path / "tuning.toml").write_text(
        f"""
[model]
init_from = "{run_dir}"
[data]
path = "{lines}"
heldout = "{shutil.copy(lines, tmp_path / "held.jsonl")}"
seq = 16
[train]
steps = 1
tokens_per_step = 16
[output]
dir = "{tmp_path}/tuned"
"""
    )
    assert run(["finetune", str(tmp_path / "tuning.toml")]) == 0
    assert run(["convert", str(tmp_path / "tuned"), str(tmp_path / "a"), "--to", "hf"]) == 0
    text = (tmp_path / "a" / CARD).read_text()
    assert str(tmp_path.parent) not in text
    assert str(run_dir.parent) not in text
    recipe = tomllib.loads(section(text, "Recipe").split("```toml\n")[1].split("```")[0])
    assert recipe["model"]["init_from"] == run_dir.name
    assert recipe["data"]["heldout"] == "held.jsonl"
    assert "On the held-out texts of held.jsonl, at" in section(text, "Metrics")
    assert "| tokenizer | fingerprint `" in section(text, "Training data")


def test_a_bidirectional_model_fills_in(tmp_path: Path) -> None:
    model = make_model(tnl_config(causal=False))
    text = card("masked", model, "hf", tmp_path, None)
    assert ModelCard(text).data.pipeline_tag == "fill-mask"
    assert 'AutoModelForMaskedLM.from_pretrained("masked", trust_remote_code=True)' in text
    assert "no state: it is bidirectional" in text
