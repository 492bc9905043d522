"""The loop: what a run writes, and what changes nothing about its result."""

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import Found, Notes, constant_evaluation, some_text

from transnormer.data import write_shards
from transnormer.data.document import Document
from transnormer.data.tokenizers import ByteTokenizer
from transnormer.models import checkpoint
from transnormer.models.decoder import Decoder
from transnormer.optim import Optimizer
from transnormer.train import OneProcess, RunConfig, TrainingDiverged, run_training
from transnormer.train.metrics import read_records

MakeConfig = Callable[..., RunConfig]
KEYS = [
    "step",
    "loss",
    "bits_per_byte",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "seconds",
]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_directory_holds_what_it_promises(make_config: MakeConfig) -> None:
    config = make_config("train.save_every=4")
    notes = Notes()
    result = run_training(config, evaluate=constant_evaluation, progress=notes)
    run = result.run_dir
    assert (result.step, result.stopped_by) == (6, "steps")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000006",
    ]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(list(row) == KEYS for row in rows)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [64, 128, 192, 256, 320, 384]
    reports = [report._asdict() for report in notes.steps]
    # A CPU's peak is not known.
    assert [report.pop("mfu") for report in reports] == [None] * 6
    assert reports == rows
    stored = json.loads((run / "config.json").read_text())
    assert stored.pop("resolved")["precision"] == "float32"
    assert RunConfig.model_validate(stored) == config


def test_the_model_learns(make_config: MakeConfig) -> None:
    run_training(make_config("train.steps=60", "optimizer.warmup=5"), progress=(notes := Notes()))
    assert notes.steps[-1].loss < notes.steps[0].loss - 1.0


def test_bits_per_byte_is_the_loss_over_the_bytes_of_text(make_config: MakeConfig) -> None:
    run_training(make_config("train.steps=1"), progress=(notes := Notes()))
    report = notes.steps[0]
    assert report.bits_per_byte == pytest.approx(report.loss / math.log(2))
    assert report.lr == pytest.approx(0.005)


def test_evaluations_come_before_between_and_after(make_config: MakeConfig) -> None:
    config = make_config("train.eval_every=4", "train.eval_bytes=100")
    result = run_training(config, evaluate=constant_evaluation, progress=(notes := Notes()))
    assert [report.step for report in notes.evaluations] == [0, 4, 6]
    assert notes.evaluations[0].bytes == 100
    assert result.first == notes.evaluations[0]
    assert result.last == notes.evaluations[-1]
    rows = read_records(result.run_dir / "evaluations.jsonl")
    assert rows == [report._asdict() for report in notes.evaluations]


def test_evaluation_changes_nothing(make_config: MakeConfig) -> None:
    def wasteful(*arguments: object, progress: object) -> object:
        torch.rand(7)
        return constant_evaluation(*arguments, progress=progress)

    plain = run_training(make_config("output.dir=" + make_config().output.dir + "a"))
    watched = run_training(make_config("train.eval_every=1"), evaluate=wasteful)
    assert same(weights(plain.run_dir), weights(watched.run_dir))


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    make_config: MakeConfig, tmp_path: Path, packing: str
) -> None:
    class Keep(OneProcess):
        def __init__(self) -> None:
            self.grads: list[torch.Tensor] = []

        def wrap(self, model: Decoder, values: None = None) -> Decoder:
            return model.double()

        def after_backward(self, model: Decoder) -> None:
            self.grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    grads = []
    for micro_batch in (4, 1):
        config = make_config(
            "train.steps=1",
            "model.dropout=0",
            f"data.packing={packing}",
            f"train.micro_batch={micro_batch}",
            f"output.dir={tmp_path / str(micro_batch)}",
        )
        run_training(config, sync=(keep := Keep()))
        grads.append(torch.cat([grad.flatten() for grad in keep.grads]))
    assert (grads[0] - grads[1]).norm() <= 1e-12 * grads[0].norm()


def test_uneven_parts_weigh_by_their_labels(make_config: MakeConfig) -> None:
    # 50 tokens in windows of 16: the last window repeats 14 labels, which do not count.
    (Path(make_config().data.paths[0])).write_text(some_text()[:49])
    for micro_batch in (4, 1):
        run_training(
            make_config(
                "train.steps=1",
                "model.dropout=0",
                "data.heldout=0",
                f"train.micro_batch={micro_batch}",
                f"output.dir={make_config().output.dir}{micro_batch}",
            ),
            progress=(notes := Notes()),
        )
        if micro_batch == 4:
            whole = notes.steps[0]
    assert notes.steps[0].loss == pytest.approx(whole.loss, rel=1e-5)
    assert notes.steps[0].grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)


def test_clipping_bounds_the_gradient_and_reports_the_norm_before(make_config: MakeConfig) -> None:
    class Watch(OneProcess):
        def after_backward(self, model: Decoder) -> None:
            self.before = model.embedding.weight.detach().clone()

        def after_step(self, model: Decoder, step: int) -> None:
            self.moved = (model.embedding.weight - self.before).abs().max().item()

    # Gradients of 1e-14 vanish beside AdamW's epsilon: the update is then far below the rate.
    overrides = ("train.steps=1", "optimizer.weight_decay=0", "optimizer.clip=1e-14")
    run_training(make_config(*overrides), progress=(notes := Notes()), sync=(watch := Watch()))
    assert notes.steps[0].grad_norm > 0.01
    assert watch.moved < 1e-5 * notes.steps[0].lr


def test_gradients_are_gone_when_copies_meet(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    prepare = Optimizer.prepare

    def prepared(self: Optimizer, factor: Any) -> Any:
        grads = [x.grad for x in self._names]
        held.extend(weakref.ref(x) for x in grads)
        make = prepare(self, factor)
        # As the optimizer of a GPU, which knows them by their addresses.
        return lambda held=grads: make()

    class Meeting(OneProcess):
        def outer_step(self, model: torch.nn.Module, lr: float) -> None:
            assert held
            assert not any(x() is not None for x in held)

    monkeypatch.setattr(Optimizer, "prepare", prepared)
    run_training(make_config("train.steps=2"), sync=Meeting())


def test_loss_that_is_not_finite_stops_the_run(make_config: MakeConfig) -> None:
    class Poison(OneProcess):
        def after_step(self, model: Decoder, step: int) -> None:
            if step == 3:
                with torch.no_grad():
                    model.embedding.weight.fill_(math.nan)

    config = make_config("train.save_every=2")
    pattern = r"loss is nan at step 4; .*checkpoint is .*step_00000002; lower optimizer.lr"
    with pytest.raises(TrainingDiverged, match=pattern):
        run_training(config, sync=Poison())
    assert len(read_records(Path(config.output.dir) / "metrics.jsonl")) == 3


def test_gradient_that_is_not_finite_stops_the_run(make_config: MakeConfig) -> None:
    class Poison(OneProcess):
        steps = 0

        def after_backward(self, model: Decoder) -> None:
            self.steps += 1
            if self.steps == 3:
                model.embedding.weight.grad[0, 0] = math.inf

    config = make_config("train.save_every=2")
    pattern = r"grad_norm is inf at step 3; .*checkpoint is .*step_00000002"
    with pytest.raises(TrainingDiverged, match=pattern):
        run_training(config, sync=Poison())
    assert len(read_records(Path(config.output.dir) / "metrics.jsonl")) == 2


def test_a_step_that_is_not_finite_is_neither_recorded_nor_saved(make_config: MakeConfig) -> None:
    class Poison(OneProcess):
        steps = 0

        def after_backward(self, model: Decoder) -> None:
            self.model = model
            self.steps += 1
            if self.steps == 3:
                model.embedding.weight.grad[0, 0] = math.nan

    config = make_config("train.save_every=1", "train.keep_last=0")
    with pytest.raises(TrainingDiverged, match=r"grad_norm is nan at step 3; .*step_00000002"):
        run_training(config, sync=(poison := Poison()))
    assert all(bool(p.isfinite().all()) for p in poison.model.parameters())
    run = Path(config.output.dir)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000001", "step_00000002"]
    run_training(config, resume=True)
    broken = [row["loss"] for row in read_records(run / "metrics.jsonl")]
    plain = make_config("train.save_every=1", f"output.dir={run.parent / 'plain'}")
    run_training(plain)
    rows = read_records(Path(plain.output.dir) / "metrics.jsonl")
    assert broken == [row["loss"] for row in rows]


@pytest.mark.parametrize("save_every", [0, 2])
def test_parameters_that_are_not_finite_are_never_saved(
    make_config: MakeConfig, save_every: int
) -> None:
    class Poison(OneProcess):
        def after_step(self, model: Decoder, step: int) -> None:
            if step == 4:
                with torch.no_grad():
                    model.blocks[1].channel_mixer.up_proj.weight[0, 0] = math.inf

    config = make_config(f"train.save_every={save_every}", "train.steps=4")
    last = ".*step_00000002" if save_every else "none"
    pattern = rf"up_proj.weight is NaN or infinite after step 4; .*checkpoint is {last}; lower"
    with pytest.raises(TrainingDiverged, match=pattern):
        run_training(config, sync=Poison())
    names = [path.name for path in (Path(config.output.dir) / "checkpoints").iterdir()]
    assert names == (["step_00000002"] if save_every else [])


@pytest.mark.parametrize(("bad_step", "last"), [(0, "none"), (4, ".*step_00000002")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_stops_the_run(
    make_config: MakeConfig, value: float, bad_step: int, last: str
) -> None:
    notes = Notes()

    def evaluate(*arguments: Any, progress: object) -> Found:
        found = constant_evaluation(*arguments)
        step = notes.steps[-1].step if notes.steps else 0
        return found._replace(nats_per_token=value) if step == bad_step else found

    config = make_config("train.save_every=2", "train.eval_every=2")
    pattern = rf"held-out loss is (nan|inf) at step {bad_step}; .*checkpoint is {last}; lower"
    with pytest.raises(TrainingDiverged, match=pattern):
        run_training(config, evaluate=evaluate, progress=notes)
    rows = read_records(Path(config.output.dir) / "evaluations.jsonl")
    assert [row["step"] for row in rows] == list(range(0, bad_step, 2))


def test_a_time_budget_ends_the_run_with_a_checkpoint(make_config: MakeConfig) -> None:
    result = run_training(make_config("train.max_minutes=1e-9"))
    assert (result.step, result.stopped_by) == (1, "max_minutes")
    assert result.checkpoint.name == "step_00000001"
    assert run_training(make_config(), resume=True).step == 6


def test_bpe_is_trained_on_the_training_part_and_kept_beside_the_weights(
    make_config: MakeConfig,
) -> None:
    text = some_text(3000)
    Path(make_config().data.paths[0]).write_text(text + "Q" * 600)
    config = make_config("data.tokenizer=bpe:300", "data.heldout=0.2", "train.steps=1")
    result = run_training(config, progress=(notes := Notes()))
    from transnormer.data import load_tokenizer

    tokenizer = load_tokenizer(result.checkpoint)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("QQQQ")) == 4
    assert checkpoint.load(result.checkpoint).config.vocab_size == 300
    assert notes.steps[0].bits_per_byte < notes.steps[0].loss / math.log(2)


def test_several_paths_are_mixed_by_weight(make_config: MakeConfig, tmp_path: Path) -> None:
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(letter * 2000)
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    config = make_config(f"data.path={paths}", "data.weights=[3.0, 1.0]", "train.steps=1")
    result = run_training(config)
    resolved = json.loads((result.run_dir / "config.json").read_text())["resolved"]
    assert resolved["training_tokens"] == [1801, 1801]


def test_tokenised_paths_bring_their_tokenizer_or_name_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    write_shards([Document("a", some_text(2000))], ByteTokenizer(), tmp_path / "shards")
    shards = f"data.path={tmp_path / 'shards'}"
    with pytest.raises(ValueError, match="data.tokenizer is missing, and data.path .* bare shards"):
        run_training(make_config(shards))
    assert run_training(make_config(shards, "data.tokenizer=bytes")).step == 6


def test_shards_of_another_tokenizer_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    from transnormer.data import train_bpe

    train_bpe([some_text()], 300).save(tmp_path / "tokenizer")
    write_shards([Document("a", some_text(2000))], ByteTokenizer(), tmp_path / "shards")
    config = make_config(
        f"data.path={tmp_path / 'shards'}", f"data.tokenizer={tmp_path / 'tokenizer'}"
    )
    with pytest.raises(ValueError, match="shards was made with tokenizer .*; expected"):
        run_training(config)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.path=nowhere.txt", FileNotFoundError, "data.path is 'nowhere.txt'"),
        ("data.tokenizer=nowhere", FileNotFoundError, "tokenizer is 'nowhere'"),
        ("data.tokenizer=bpe:many", ValueError, "tokenizer is 'bpe:many'"),
        ("data.heldout=nowhere.txt", FileNotFoundError, "nowhere.txt"),
        ("data.seq=64000", ValueError, "64000"),
        ("train.device=cuda", RuntimeError, "train.device is 'cuda'"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing_behind(
    make_config: MakeConfig, override: str, error: type[Exception], message: str
) -> None:
    if override == "train.device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = make_config("train.tokens_per_step=64000", override)
    with pytest.raises(error, match=message) as caught:
        run_training(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.output.dir).exists()


def test_bfloat16_trains_and_keeps_float32_weights(make_config: MakeConfig) -> None:
    result = run_training(make_config("train.precision=bfloat16"), progress=(notes := Notes()))
    assert all(x.dtype == torch.float32 for x in weights(result.run_dir).values())
    assert math.isfinite(notes.steps[-1].loss)


def test_muon_trains(make_config: MakeConfig) -> None:
    result = run_training(make_config("optimizer.name=muon", "train.steps=3"))
    assert result.step == 3
