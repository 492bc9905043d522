"""Model cards: what a run read, how, and how well it did; nothing where nothing is known."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from decoder_cases import make_model, tnl_config
from huggingface_hub import ModelCard

from transnormer.cli.app import run
from transnormer.export.model_card import CARD, card, write_card
from transnormer.models import checkpoint

RUN = """
[model]
model_dim = 32
num_layers = 2
heads = 2
glu_dim = 32
[data]
path = "{corpus}"
tokenizer = "bytes"
seq = 16
[train]
steps = 4
tokens_per_step = 64
eval_every = 2
save_every = 2
precision = "float32"
device = "cpu"
[optimizer]
lr = 0.002
[output]
dir = "{folder}/tiny"
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a corpus with an absolute path."""
    folder = tmp_path_factory.mktemp("cards")
    corpus = folder / "corpus.txt"
    corpus.write_text("the sea has no end and the moon no shore\n" * 200)
    (folder / "run.toml").write_text(RUN.format(corpus=corpus, folder=folder))
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
    write_card(source, model, source, "transnormer")
    assert "nothing beside them says what they were trained on" in (source / CARD).read_text()
    (source / CARD).write_text("the author's words")
    assert run(["convert", str(source), str(target), "--to", "released"]) == 0
    assert (target / CARD).read_text() == "the author's words"


def test_a_bidirectional_model_fills_in(tmp_path: Path) -> None:
    model = make_model(tnl_config(causal=False))
    text = card("masked", model, "hf", tmp_path, None)
    assert ModelCard(text).data.pipeline_tag == "fill-mask"
    assert 'AutoModelForMaskedLM.from_pretrained("masked", trust_remote_code=True)' in text
    assert "no state: it is bidirectional" in text
