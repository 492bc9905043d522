"""What a run reads: never what is held out, nothing twice, and the same when it goes on."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from data_cases import sentencepiece_model
from train_cases import Found, Notes, constant_evaluation, some_text

from transnormer.data import (
    ByteTokenizer,
    Document,
    TokenSource,
    embedded_documents,
    tokenize_corpus,
    write_shards,
)
from transnormer.train import RunConfig, run_training
from transnormer.train.training_data import open_training_data

MakeConfig = Callable[..., RunConfig]


class Seen:
    """An evaluation that keeps the texts it is given."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, model: Any, tokenizer: Any, texts: Sequence[str], **options: Any) -> Found:
        self.texts = list(texts)
        return constant_evaluation(model, tokenizer, texts, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three texts of letters of their own: a, b, and val of V."""
    folder = tmp_path / "tx"
    folder.mkdir()
    for name, letter in (("a", "a"), ("b", "b"), ("val", "V")):
        (folder / f"{name}.txt").write_text(letter * 500)
    return folder


def trained_on(run_dir: Path) -> str:
    """All text of a run's training shards."""
    sources = [TokenSource(path.parent) for path in sorted(run_dir.glob("data/*/train/m*.json"))]
    return "".join(ByteTokenizer().decode(source.tokens(0, len(source))) for source in sources)


@pytest.mark.parametrize("pattern", ["tx", "tx/*.txt"])
@pytest.mark.parametrize("heldout", ["tx/val.txt", "tx/v*.txt", "tx/../tx/val.txt"])
def test_held_out_files_are_not_trained_on(
    make_config: MakeConfig, folder: Path, pattern: str, heldout: str
) -> None:
    base = folder.parent
    config = make_config(f"data.path={base / pattern}", f"data.heldout={base / heldout}")
    run_dir = run_training(config, evaluate=(seen := Seen())).run_dir
    assert trained_on(run_dir) == "a" * 500 + "b" * 500
    assert seen.texts == ["V" * 500]


def test_a_tokenizer_is_not_trained_on_held_out_files(
    make_config: MakeConfig, folder: Path
) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(some_text(3000))
    config = make_config(
        f"data.path={folder}", f"data.heldout={folder / 'val.txt'}", "data.tokenizer=bpe:270"
    )
    from transnormer.data import load_tokenizer

    tokenizer = load_tokenizer(run_training(config).checkpoint)
    assert len(tokenizer.encode("VVVVVVVV")) == 8


def test_a_corpus_that_is_all_held_out_is_refused(make_config: MakeConfig, folder: Path) -> None:
    text = folder / "val.txt"
    with pytest.raises(ValueError, match="val.txt', which holds no text beside the held-out one"):
        run_training(make_config(f"data.path={text}", f"data.heldout={text}"))


@pytest.mark.parametrize(
    "paths", [["tx", "tx/val.txt"], ["tx/[av]*.txt", "tx/v*.txt"], ["tx/val.txt"] * 2]
)
def test_a_text_that_two_paths_hold_is_refused(
    make_config: MakeConfig, folder: Path, paths: list[str]
) -> None:
    given = [str(folder.parent / path) for path in paths]
    with pytest.raises(ValueError, match=r"data.path holds .*val.txt twice, as .* and as .*;"):
        run_training(make_config(f"data.path={given}"))


def test_a_tokenised_folder_and_shards_in_it_are_the_same_text(
    make_config: MakeConfig, folder: Path, tmp_path: Path
) -> None:
    tokenize_corpus(str(folder), "bytes", tmp_path / "out")
    paths = [str(tmp_path / "out"), str(tmp_path / "out" / "train")]
    with pytest.raises(ValueError, match=r"data.path holds .*train twice"):
        run_training(make_config(f"data.path={paths}", "data.tokenizer=bytes"))


def test_the_embedded_corpus_has_its_own_split_beside_other_text(
    make_config: MakeConfig, folder: Path
) -> None:
    paths = [str(folder), "embedded"]
    config = make_config(f"data.path={paths}", "data.heldout=embedded", "train.steps=1")
    run_training(config, evaluate=(seen := Seen()))
    assert seen.texts == [document.text for document in embedded_documents("heldout")]


@pytest.mark.parametrize("kind", ["shards", "folder", "beside text"])
def test_a_held_out_text_is_used_once_beside_tokenised_paths(
    make_config: MakeConfig, folder: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "shards":
        write_shards([Document("a", "c" * 900)], ByteTokenizer(), tmp_path / "out")
    else:
        (tmp_path / "c.txt").write_text("c" * 900)
        tokenize_corpus(str(tmp_path / "c.txt"), "bytes", tmp_path / "out")
    paths = [str(tmp_path / "out"), *([str(folder)] if kind == "beside text" else [])]
    config = make_config(
        f"data.path={paths}", "data.tokenizer=bytes", f"data.heldout={folder / 'val.txt'}"
    )
    run_training(config, evaluate=(seen := Seen()))
    assert seen.texts == ["V" * 500]


def test_a_tokenised_folder_brings_its_own_held_out_part(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "c.txt").write_text("c" * 900 + "V" * 100)
    tokenize_corpus(str(tmp_path / "c.txt"), "bytes", tmp_path / "out")
    config = make_config(f"data.path={tmp_path / 'out'}")
    run_training(config, evaluate=(seen := Seen()))
    assert seen.texts == ["V" * 100]


def test_a_share_of_a_tokenised_path_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    write_shards([Document("a", "c" * 900)], ByteTokenizer(), tmp_path / "out")
    config = make_config(
        f"data.path={tmp_path / 'out'}", "data.tokenizer=bytes", "data.heldout=0.2"
    )
    message = "data.heldout is 0.2; expected it unset, since data.path is tokenised"
    with pytest.raises(ValueError, match=message):
        run_training(config)


def tamper(data: Path, how: str) -> None:
    manifest = data / "00" / "train" / "manifest.json"
    if how == "held-out part removed":
        shutil.rmtree(data / "00" / "heldout")
    elif how == "start token changed":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"start_id": 0}))
    elif how == "record removed":
        (data / "data.json").unlink(missing_ok=True)
    else:
        (data / "data.json").write_text('{"parts": 3}')


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("held-out part removed", r"heldout.manifest.json is missing; .*start another run"),
        ("start token changed", r"train.manifest.json has changed since the run began"),
        ("record removed", r"data.json is not a file"),
        ("record damaged", r"parts is 3; expected a list .*data.json"),
    ],
)
def test_a_run_goes_on_with_the_data_it_began_with_or_not_at_all(
    make_config: MakeConfig, how: str, message: str
) -> None:
    run_dir = run_training(make_config("train.steps=1"), evaluate=constant_evaluation).run_dir
    tamper(run_dir / "data", how)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_training(make_config("train.steps=2"), resume=True, evaluate=constant_evaluation)


def test_tokenised_paths_must_not_change_under_a_run(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    shards = tmp_path / "out"
    write_shards([Document("a", "c" * 900)], ByteTokenizer(), shards)
    overrides = (f"data.path={shards}", "data.tokenizer=bytes")
    run_training(make_config(*overrides, "train.steps=1"))
    shutil.rmtree(shards)
    write_shards([Document("a", "d" * 900)], ByteTokenizer(), shards)
    with pytest.raises(ValueError, match="manifest.json has changed since the run began"):
        run_training(make_config(*overrides, "train.steps=2"), resume=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tokenizer=nowhere", "tokenizer is 'nowhere'"),
        ("data.tokenizer=bpe:many", "data.tokenizer is 'bpe:many'"),
        ("data.tokenizer=bpe:100", "data.tokenizer is 'bpe:100'; expected bpe:N with N at least"),
        ("model.vocab_size=200", "model.vocab_size is 200; expected at least the tokenizer's 259"),
    ],
)
def test_tokenizer_and_vocabulary_are_checked_before_any_text_is_read(
    make_config: MakeConfig, override: str, message: str
) -> None:
    notes = Notes()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_training(make_config(override), progress=notes)
    assert notes.messages == []


def test_bits_per_byte_of_a_tokenizer_with_a_prefix_counts_the_text_alone(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    texts = ["the text", "what the model reads", "line"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    # Every label of one epoch is in the one step.
    overrides = ("data.heldout=0", "data.seq=1", "train.steps=1", "model.dropout=0")
    paths = (
        f"data.path={tmp_path / 'few.jsonl'}",
        f"data.tokenizer={tmp_path / 'tokenizer.model'}",
    )
    probe = run_training(make_config(*overrides, *paths, f"output.dir={tmp_path / 'probe'}"))
    resolved = json.loads((probe.run_dir / "config.json").read_text())["resolved"]
    (tokens,) = resolved["training_tokens"]
    config = make_config(*overrides, *paths, f"train.tokens_per_step={tokens}")
    run_training(config, progress=(notes := Notes()))
    report = notes.steps[0]
    size = sum(len(text) for text in texts)
    bits = report.loss * tokens / 0.6931471805599453
    assert report.bits_per_byte == pytest.approx(bits / size)


def test_epochs_weigh_a_path_by_its_tokens(make_config: MakeConfig, folder: Path) -> None:
    (folder / "b.txt").write_text("b" * 1500)
    paths = [str(folder / name) for name in ("a.txt", "b.txt")]
    config = make_config(f"data.path={paths}", "data.epochs=[2.0, 1.0]", "data.heldout=0.0")
    run_training(config)
    data = open_training_data(config, Path(config.output.dir) / "data", lambda _: None)
    assert [(len(source), weight) for source, weight in data.sources] == [
        (501, 1002.0),
        (1501, 1501.0),
    ]
