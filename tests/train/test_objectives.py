"""Objectives: what a masked run and a classification run learn, record, resume and refuse."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_cases import (
    Crash,
    CrashAt,
    Notes,
    assert_same_checkpoint,
    constant_evaluation,
    some_text,
    tiny_run,
)

from transnormer import SequenceClassifier, load, load_classifier, save
from transnormer.cli.app import run as command
from transnormer.data import ByteTokenizer, load_tokenizer, write_shards
from transnormer.data.document import Document
from transnormer.models.decoder import Decoder
from transnormer.train import (
    ClassificationReport,
    MaskedReport,
    OneProcess,
    RunConfig,
    run_training,
)
from transnormer.train.metrics import read_records
from transnormer.train.objective_config import ClassificationConfig
from transnormer.train.objectives import OBJECTIVES, Setting
from transnormer.train.objectives.classification import accuracy, macro_f1

MakeConfig = Callable[..., RunConfig]
MASKED = ("objective.kind=masked", "model.causal=false")
CLASSES = ("objective.kind=classification", "model.causal=false", "data.seq=24")
STEP_KEYS = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Texts whose class is the word that they hold somewhere, three of five of them "hot"."""
    rows = []
    for number in range(60):
        word = "hot" if number % 5 < 3 else "icy"
        start = ("", "so ", "now ")[number % 3]
        rows.append({"text": f"{start}{number} it is {word} today", "label": word})
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def classes(make_config: MakeConfig, labelled: Path) -> MakeConfig:
    """Build a tiny classification run."""
    fixed = (*CLASSES, f"data.path={labelled}", "data.heldout=0.25", "train.tokens_per_step=192")
    return lambda *overrides: make_config(*fixed, *overrides)


def open_objective(config: RunConfig, folder: Path) -> Any:
    """The objective of a run, without the run."""
    kind = OBJECTIVES[config.objective.kind]
    return kind(Setting(config, folder, lambda text: None, constant_evaluation, 0, 1))


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_records(run_dir / "metrics.jsonl")]


def scores(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_records(run_dir / "evaluations.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_run_of_before_there_were_objectives_resumes(make_config: MakeConfig) -> None:
    with pytest.raises(Crash):
        run_training(make_config("train.save_every=2"), progress=CrashAt(3))
    path = Path(make_config().output.dir) / "config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("objective") == {"kind": "causal"}
    for key in ("causal", "init_from"):
        assert stored["model"].pop(key) is None
    path.write_text(json.dumps(stored))
    assert run_training(make_config("train.save_every=2"), resume=True).step == 6


def test_another_objective_is_another_run(make_config: MakeConfig) -> None:
    run_training(make_config(*MASKED, "train.steps=1"))
    with pytest.raises(ValueError, match=r"objective.mask_share is 0.3; expected 0.15, as the run"):
        run_training(make_config(*MASKED, "objective.mask_share=0.3"), resume=True)
    bidirectional = make_config(*MASKED).model_copy(update={"objective": ClassificationConfig()})
    with pytest.raises(ValueError, match="objective.kind is 'classification'; expected 'masked'"):
        run_training(bidirectional, resume=True)


def test_a_masked_run_records_what_it_measures(make_config: MakeConfig) -> None:
    config = make_config(*MASKED, "train.eval_every=4")
    result = run_training(config, progress=(notes := Notes()))
    rows = [json.loads(x) for x in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(list(row) == STEP_KEYS for row in rows)
    assert [row["tokens"] for row in rows] == [64 * step for step in range(1, 7)]
    assert all(report.bits_per_byte is None for report in notes.steps)
    found = [json.loads(x) for x in (result.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [0, 4, 6]
    assert list(found[0]) == ["step", "loss", "accuracy", "masked_tokens", "seconds"]
    assert isinstance(result.last, MaskedReport)
    assert result.last.headline().name == "nats per masked token"
    assert (result.run_dir / "loss.png").stat().st_size
    model = load(result.run_dir)
    assert not model.config.causal
    assert (model.config.vocab_size, model.config.mask_token_id) == (260, 259)


def test_a_masked_model_learns(make_config: MakeConfig) -> None:
    config = make_config(*MASKED, "train.steps=60", "optimizer.warmup=5")
    result = run_training(config)
    assert isinstance(result.first, MaskedReport)
    assert isinstance(result.last, MaskedReport)
    assert result.last.loss < result.first.loss - 1.0
    assert result.last.accuracy > result.first.accuracy


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_resumed_masked_run_equals_an_uninterrupted_one_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, packing: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(some_text(200 + 7 * number)[number:])
    fixed = (*MASKED, f"data.packing={packing}", f"data.path={folder}", "train.save_every=2")
    whole = run_training(make_config(*fixed, f"output.dir={tmp_path / 'whole'}"))
    with pytest.raises(Crash):
        run_training(make_config(*fixed), progress=CrashAt(5))
    torch.rand(100)
    resumed = run_training(make_config(*fixed), resume=True)
    assert_same_checkpoint(whole.checkpoint, resumed.checkpoint)
    assert losses(whole.run_dir) == losses(resumed.run_dir)
    assert scores(whole.run_dir) == scores(resumed.run_dir)


def test_masks_do_not_depend_on_the_size_of_a_micro_batch(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    whole = open_objective(make_config(*MASKED), tmp_path / "data")
    parts = open_objective(make_config(*MASKED, "train.micro_batch=1"), tmp_path / "data")
    rows = [parts.batch(index) for index in range(4, 8)]
    for field in ("input_ids", "labels"):
        joined = torch.cat([getattr(row, field) for row in rows])
        assert torch.equal(getattr(whole.batch(1), field), joined)
    assert whole.counts(whole.batch(1)).labels == int((whole.batch(1).labels >= 0).sum())


def test_another_epoch_hides_other_tokens(make_config: MakeConfig, tmp_path: Path) -> None:
    Path(make_config().data.paths[0]).write_text(some_text(64)[:63])
    config = make_config(*MASKED, "data.heldout=0")
    objective = open_objective(config, tmp_path / "data")
    first, second = objective.batch(0), objective.batch(1)
    assert not torch.equal(first.labels, second.labels)


def test_tokens_that_a_window_repeats_are_not_asked_for_again(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # 50 tokens in windows of 16: 14 tokens of the last window were in the one before.
    Path(make_config().data.paths[0]).write_text(some_text()[:49])
    config = make_config(*MASKED, "data.heldout=0", "objective.mask_share=1.0")
    batch = open_objective(config, tmp_path / "data").batch(0)
    assert sorted((batch.labels >= 0).sum(1).tolist()) == [2, 15, 16, 16]


def test_the_held_out_loss_is_that_of_the_masked_tokens_under_fixed_masks(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    one = open_objective(make_config(*MASKED), tmp_path / "data")
    other = open_objective(
        make_config(*MASKED, "train.seed=9", "train.micro_batch=1"), tmp_path / "data"
    )
    torch.manual_seed(0)
    model = one.build_model().eval()
    seen: list[int] = []
    with torch.no_grad():
        found = one.evaluate(model, seen.append)
        again = other.evaluate(model, seen.append)
        nats, right, count = 0.0, 0, 0
        for batch in one._heldout_batches():
            logits = model(batch.input_ids).logits[batch.labels != -100]
            labels = batch.labels[batch.labels != -100]
            nats += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    assert sum(seen) == 2 * sum(len(text) + 1 for text in one.heldout)
    assert found["masked_tokens"] == again["masked_tokens"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["loss"] == pytest.approx(again["loss"], rel=1e-5)
    assert found["accuracy"] == again["accuracy"] == right / count


def test_a_classifier_learns_and_is_compared_with_the_majority(classes: MakeConfig) -> None:
    config = classes("train.steps=60", "optimizer.warmup=5", "train.eval_every=30")
    result = run_training(config, progress=(notes := Notes()))
    assert isinstance(result.last, ClassificationReport)
    assert result.last.accuracy > result.last.majority_accuracy + 0.2
    assert result.last.macro_f1 > 0.8
    assert result.last.texts == 15
    rows = [json.loads(x) for x in (result.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 30, 60]
    keys = ["step", "loss", "accuracy", "majority_accuracy", "macro_f1", "texts", "seconds"]
    assert list(rows[0]) == keys
    steps = [json.loads(x) for x in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(list(row) == STEP_KEYS for row in steps)
    assert any("45 training texts, 15 held out; hot" in text for text in notes.messages)
    model = load_classifier(result.run_dir)
    assert model.config.labels == ("hot", "icy")
    resolved = json.loads((result.run_dir / "config.json").read_text())["resolved"]
    assert resolved["classes"] == ["hot", "icy"]
    assert (resolved["training_texts"], resolved["heldout_texts"]) == (45, 15)
    assert resolved["classifier"]["num_classes"] == 2


def test_tokens_of_a_classification_run_are_counted_without_pads(
    classes: MakeConfig, tmp_path: Path
) -> None:
    objective = open_objective(classes(), tmp_path / "data")
    batch = objective.batch(0)
    assert objective.counts(batch) == (8, int(batch.mask.sum()), 0)
    seen: list[int] = []
    with torch.no_grad():
        objective.evaluate(objective.build_model().eval(), seen.append)
    assert sum(seen) == int((objective.heldout.lengths() + 1).sum())
    run_training(classes("train.steps=1"), progress=(notes := Notes()))
    assert notes.steps[0].tokens == int(batch.mask.sum())


def test_the_loss_of_a_step_is_the_mean_over_its_texts(classes: MakeConfig) -> None:
    grads, reports = [], []
    for micro_batch in (8, 2):

        class Keep(OneProcess):
            def wrap(self, model: SequenceClassifier, values: None = None) -> SequenceClassifier:
                return model.double()

            def after_backward(self, model: SequenceClassifier) -> None:
                grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

        config = classes(
            "train.steps=1",
            "model.dropout=0",
            "objective.dropout=0",
            f"train.micro_batch={micro_batch}",
            f"output.dir={classes().output.dir}{micro_batch}",
        )
        run_training(config, sync=Keep(), progress=(notes := Notes()))
        reports.append(notes.steps[0])
    assert reports[0].loss == pytest.approx(math.log(2), abs=0.1)
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-12)
    assert (grads[0] - grads[1]).norm() <= 1e-12 * grads[0].norm()


def test_a_resumed_classification_run_equals_an_uninterrupted_one_bit_for_bit(
    classes: MakeConfig, tmp_path: Path, labelled: Path
) -> None:
    fixed = ("train.save_every=2", "data.tokenizer=bpe:270")
    whole = run_training(classes(*fixed, f"output.dir={tmp_path / 'whole'}"))
    with pytest.raises(Crash):
        run_training(classes(*fixed), progress=CrashAt(5))
    # The texts of a run are its own.
    labelled.unlink()
    resumed = run_training(classes(*fixed), resume=True)
    assert_same_checkpoint(whole.checkpoint, resumed.checkpoint)
    assert losses(whole.run_dir) == losses(resumed.run_dir)
    assert scores(whole.run_dir) == scores(resumed.run_dir)


def test_labels_that_changed_are_not_resumed(classes: MakeConfig) -> None:
    run_dir = run_training(classes("train.steps=1")).run_dir
    path = run_dir / "data" / "train" / "labels.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="labels.npy has changed since the run began; expected"):
        run_training(classes(), resume=True)


def test_a_held_out_file_is_not_trained_on(classes: MakeConfig, labelled: Path) -> None:
    row = json.dumps({"text": "so icy", "label": "icy"}) + "\n"
    (labelled.parent / "held.jsonl").write_text(row * 3)
    paths = f"data.path={labelled.parent}/*.jsonl", f"data.heldout={labelled.parent / 'held.jsonl'}"
    result = run_training(classes(*paths, "train.steps=1"))
    resolved = json.loads((result.run_dir / "config.json").read_text())["resolved"]
    assert (resolved["training_texts"], resolved["heldout_texts"]) == (60, 3)
    assert isinstance(result.last, ClassificationReport)
    assert result.last.majority_accuracy == 0.0


def test_all_held_out_leaves_nothing_to_train_on(classes: MakeConfig, labelled: Path) -> None:
    with pytest.raises(ValueError, match="data.path is .*, all of which is held out or empty; exp"):
        run_training(classes(f"data.heldout={labelled}"))


def test_of_many_classes_the_shares_of_the_first_are_told(
    classes: MakeConfig, labelled: Path
) -> None:
    rows = [{"text": f"number {i}", "label": f"c{i % 20:02}"} for i in range(200)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = Notes()
    run_training(classes("train.steps=1"), progress=notes)
    told = next(line for line in notes.messages if "training texts, " in line)
    assert "c09 " in told
    assert "c10 " not in told
    assert told.endswith("and 10 more classes")


def test_nothing_held_out_is_nothing_evaluated(classes: MakeConfig) -> None:
    result = run_training(classes("data.heldout=0", "train.steps=1"))
    assert result.first is None
    assert not scores(result.run_dir)


def test_long_texts_are_cut_and_counted(classes: MakeConfig, tmp_path: Path) -> None:
    run_training(classes("data.seq=6", "train.steps=1"), progress=(notes := Notes()))
    assert "45 training texts have more than data.seq = 6 tokens: cut" in notes.messages


def test_accuracy_and_macro_f1_are_the_textbook_ones() -> None:
    answers, labels = [0, 0, 1, 1, 2, 0], [0, 1, 1, 1, 0, 0]
    assert accuracy(answers, labels) == pytest.approx(4 / 6)
    # Class 0: TP 2 FP 1 FN 1; class 1: TP 2 FP 0 FN 1; class 2: TP 0 FP 1 FN 0.
    assert macro_f1(answers, labels) == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_starts_from_a_causal_run(
    make_config: MakeConfig, classes: MakeConfig, tmp_path: Path, tied: bool
) -> None:
    first = f"output.dir={tmp_path / 'first'}"
    trained = run_training(
        make_config(
            first, "train.steps=2", "data.tokenizer=bpe:300", f"model.tie_embeddings={tied}".lower()
        )
    )
    config = started_from(classes, trained.run_dir)
    objective = open_objective(config, tmp_path / "data")
    model, source = objective.build_model(), load(trained.run_dir)
    assert objective.tokenizer.fingerprint == load_tokenizer(trained.checkpoint).fingerprint
    assert model.config.backbone.causal
    for name, x in model.backbone.state_dict().items():
        assert torch.equal(x, source.state_dict()[name])
    assert run_training(config).step == 6


def test_a_classifier_starts_from_a_masked_run_and_keeps_its_mask_token(
    make_config: MakeConfig, classes: MakeConfig, tmp_path: Path
) -> None:
    masked = run_training(make_config(*MASKED, "train.steps=2", f"output.dir={tmp_path / 'first'}"))
    config = started_from(classes, masked.run_dir, "model.dropout=0.3")
    model = open_objective(config, tmp_path / "data").build_model()
    backbone = model.config.backbone
    assert (backbone.causal, backbone.vocab_size, backbone.mask_token_id) == (False, 260, 259)
    assert backbone.dropout == 0.3
    assert torch.equal(model.backbone.embedding.weight, load(masked.run_dir).embedding.weight)


def started_from(classes: MakeConfig, source: Path, *overrides: str) -> RunConfig:
    """A classification run with model.init_from alone."""
    data = classes().model_dump()
    data["model"] = {"init_from": str(source)}
    config = RunConfig.model_validate(data)
    for override in overrides:
        key, _, value = override.partition("=")
        data["model"][key.removeprefix("model.")] = float(value)
        config = RunConfig.model_validate(data)
    return config


def test_a_start_that_does_not_fit_is_refused(
    make_config: MakeConfig, classes: MakeConfig, tmp_path: Path
) -> None:
    causal = run_training(make_config("train.steps=1", f"output.dir={tmp_path / 'causal'}")).run_dir
    masked = make_config(*MASKED).model_dump() | {"model": {"init_from": str(causal)}}
    masked["model"]["causal"] = False
    config = RunConfig.model_validate(masked)
    with pytest.raises(ValueError, match="vocab_size of .* is 259; .* mask token, 260; take"):
        run_training(config)
    masked["model"]["causal"] = None
    with pytest.raises(ValueError, match="model.causal is true; expected false for objective"):
        run_training(RunConfig.model_validate(masked))
    other = started_from(classes, causal).model_dump()
    other["data"]["tokenizer"] = "bpe:260"
    other["model"]["init_from"] = str(tmp_path / "wide")
    wide = Decoder(load(causal).config.model_copy(update={"vocab_size": 400}))
    save(wide, tmp_path / "wide")
    with pytest.raises(FileNotFoundError, match="which holds no tokenizer; expected one beside"):
        run_training(started_from(classes, tmp_path / "wide"))
    assert run_training(RunConfig.model_validate(other)).step == 6
    other["model"]["init_from"] = str(causal)
    other["data"]["tokenizer"] = "bpe:259"
    other["output"]["dir"] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="data.tokenizer has the fingerprint .* was trained with"):
        run_training(RunConfig.model_validate(other))
    other["model"]["init_from"] = str(tmp_path / "run")
    with pytest.raises(ValueError, match="is a sequence classifier; expected a decoder"):
        run_training(RunConfig.model_validate(other))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("objective.kind=masked",), "model.causal is true; expected false for objective.kind"),
        (("model.causal=false",), "model.causal is false; expected true for objective.kind"),
        (("objective.kind=contrastive",), "objective.kind is 'contrastive'; expected one of"),
        (("objective.mask_share=0.1",), "objective.kind is missing; expected one of"),
        ((*MASKED, "objective.mask_share=0"), "objective.mask_share is 0"),
        ((*MASKED, "objective.random_token=0.3"), "objective.random_token is 0.3 beside mask_t"),
        ((*MASKED, "objective.pooling=mean"), "objective.pooling is an unknown key"),
        (("model.init_from=runs/x",), "model has .*init_from.*; expected name alone"),
        ((*CLASSES,), "data.path is .*; expected one path of JSON lines with 'text' and 'label'"),
        ((*CLASSES, "data.path=x", "data.packing=documents"), "data.packing is documents; exp"),
        ((*CLASSES, "data.path=x", "data.weights=[1.0]"), "data.weights is .*; expected it unset"),
        ((*CLASSES, "data.path=x", "data.epochs=[1.0]"), "data.epochs is .*; expected it unset"),
        ((*CLASSES, "data.path=x", "train.eval_bytes=9"), "train.eval_bytes is 9; expected it un"),
        ((*CLASSES, "data.path=x", "model.tie_embeddings=false"), "tie_embeddings is False; exp"),
        ((*CLASSES, "data.path=x", "data.seq=1"), "data.seq is 1; expected at least 2: a start"),
        ((*CLASSES, "data.path=['x', 'y']"), "data.path is .*; expected one path of JSON lines"),
    ],
)
def test_wrong_combinations_are_one_line(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny_run(tmp_path, "train.tokens_per_step=192", "data.path=embedded", *overrides)
    assert "\n" not in str(caught.value)


def test_a_causal_run_cannot_start_from_a_bidirectional_model(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    masked = run_training(make_config(*MASKED, "train.steps=1", f"output.dir={tmp_path / 'first'}"))
    data = make_config().model_dump() | {"model": {"init_from": str(masked.run_dir)}}
    with pytest.raises(ValueError, match="model.causal is false; expected true for objective.kind"):
        run_training(RunConfig.model_validate(data))


def test_a_start_brings_its_own_sizes(make_config: MakeConfig) -> None:
    data = make_config().model_dump()
    for key, value in (("vocab_size", 300), ("tie_embeddings", True), ("init_std", 0.1)):
        data["model"] = {"init_from": "runs/x", key: value}
        with pytest.raises(ValueError, match=f"{key} is {value} beside init_from; expected it un"):
            RunConfig.model_validate(data)


def test_tokens_have_no_classes(classes: MakeConfig, tmp_path: Path) -> None:
    write_shards([Document("a", some_text(2000))], ByteTokenizer(), tmp_path / "shards" / "train")
    for path in (tmp_path / "shards", tmp_path / "shards" / "train"):
        with pytest.raises(ValueError, match="which is tokenised; expected JSON lines with 'text'"):
            run_training(classes(f"data.path={path}"))
    assert not Path(classes().output.dir).exists()


def test_pooling_of_the_first_token_needs_both_sides(classes: MakeConfig) -> None:
    with pytest.raises(ValueError, match="objective.pooling is 'first' and model.causal true"):
        classes("model.causal=true", "objective.pooling=first")
    assert run_training(classes("objective.pooling=first", "train.steps=1")).step == 1


def test_pooling_of_the_first_token_is_checked_before_the_texts_of_a_start_are_read(
    make_config: MakeConfig, classes: MakeConfig, tmp_path: Path
) -> None:
    causal = run_training(make_config("train.steps=1", f"output.dir={tmp_path / 'causal'}")).run_dir
    data = started_from(classes, causal).model_dump()
    data["objective"]["pooling"] = "first"
    notes = Notes()
    with pytest.raises(ValueError, match="objective.pooling is 'first' and model.causal true") as e:
        run_training(RunConfig.model_validate(data), progress=notes)
    assert "\n" not in str(e.value)
    assert not notes.messages


@pytest.mark.parametrize("kind", ["masked", "classification"])
def test_a_started_run_resumes_where_its_start_is_gone(
    kind: str, make_config: MakeConfig, classes: MakeConfig, tmp_path: Path
) -> None:
    first = make_config(*MASKED, "train.steps=1", f"output.dir={tmp_path / 'first'}")
    source = run_training(first).run_dir
    data = (classes() if kind == "classification" else make_config(*MASKED)).model_dump()
    data["model"] = {"init_from": str(source)}
    data["train"]["save_every"] = 2
    whole = data | {"output": {"dir": str(tmp_path / "whole")}}
    expected = run_training(RunConfig.model_validate(whole)).checkpoint
    config = RunConfig.model_validate(data)
    with pytest.raises(Crash):
        run_training(config, progress=CrashAt(3))
    source.rename(tmp_path / "elsewhere")
    assert_same_checkpoint(run_training(config, resume=True).checkpoint, expected)


def test_the_command_names_what_it_measured(
    tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        f"""
        model = {{ model_dim = 32, num_layers = 1, heads = 2, glu_dim = 32, causal = false }}
        data = {{ path = "{labelled}", seq = 16 }}
        train = {{ steps = 2, tokens_per_step = 64, precision = "float32", device = "cpu" }}
        objective = {{ kind = "classification" }}
        output = {{ dir = "{tmp_path / "run"}" }}
        """
    )
    assert command(["train", str(recipe), "--sample-tokens", "5"]) == 2
    assert "--sample-tokens is 5; expected 0 for objective.kind" in capsys.readouterr().err
    assert command(["train", str(recipe), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step 2/2  loss ") and "bits" not in line for line in lines)
    last = next(line for line in lines if line.startswith("held-out accuracy: "))
    assert "after (step 2); majority class 0." in last
    assert "macro-F1 0." in last
    facts = json.loads(lines[-1])
    assert facts["heldout_after"]["texts"] == 6
    assert command(["generate", str(tmp_path / "run"), "--prompt", "x"]) == 2
    assert "is a sequence classifier; expected a decoder" in capsys.readouterr().err
