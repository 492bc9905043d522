"""Fine-tuning: loss on answers alone, rows without leaks, exact resumption, adapters of peft."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chat_cases import pieces
from objective_cases import COLOURS, conversations
from tolerances import OUTPUT, relative_error
from train_cases import Crash, CrashAt, assert_same_checkpoint

from transnormer import load, save
from transnormer.config import apply_overrides, validate
from transnormer.data import ByteTokenizer
from transnormer.data.chat_template import TEMPLATES, ChatTemplate
from transnormer.data.tokenizers import load_tokenizer
from transnormer.infer.generate import generate
from transnormer.infer.lora import merge_adapter
from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.train import RunConfig, TrainResult, run_training
from transnormer.train.adapters import add_adapters, describe_size
from transnormer.train.instruction_data import _template
from transnormer.train.lora_config import LoraConfig
from transnormer.train.metrics import read_records
from transnormer.train.objective_config import InstructionConfig
from transnormer.train.objectives import InstructionReport, Setting
from transnormer.train.objectives.instruction import InstructionObjective, answer_numbers

MakeConfig = Callable[..., RunConfig]
LORA = ("lora.rank=4", "lora.dropout=0.1")
REPORT = ["step", "loss", "accuracy", "exact", "ends", "answers", "tokens", "seconds"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of bytes, with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"model_dim": 48, "num_layers": 2, "heads": 2, "glu_dim": 64}
    special = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    config = zoo.tnl_custom(vocab_size=259, **sizes).model_copy(update=special)
    path = tmp_path_factory.mktemp("base") / "model"
    save(Decoder(config), path)
    ByteTokenizer().save(path)
    return path


@pytest.fixture
def make_config(tmp_path: Path, base: Path) -> MakeConfig:
    """Build a tiny fine-tuning in tmp_path/run; arguments are overrides."""
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    data = {
        "model": {"init_from": str(base), "dropout": 0.1},
        "objective": {"kind": "instruction"},
        "data": {"path": str(lines), "seq": 128, "heldout": 0.2},
        "train": {"steps": 4, "tokens_per_step": 256, "precision": "float32", "device": "cpu"},
        "optimizer": {"lr": 1e-2, "warmup": 2},
        "output": {"dir": str(tmp_path / "run")},
    }
    return lambda *given: validate(RunConfig, apply_overrides(data, given), source="test")


def objective_of(config: RunConfig, folder: Path) -> InstructionObjective:
    """The objective of a run, without the run."""
    return InstructionObjective(Setting(config, folder, lambda text: None, None, 0, 1))


def test_the_loss_of_a_row_is_that_of_its_conversations_alone(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    objective = objective_of(make_config(), tmp_path / "data")
    model = objective.build_model().double().eval()
    batch = objective.batch(0)
    assert batch.cu_seqlens.shape[0] > 4
    alone = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for sample in objective.loader.samples(0):
        for index in objective.loader.rows[objective.loader.locate(sample)[1]]:
            ids, labels = map(torch.from_numpy, objective.train.conversation(index))
            alone += model.loss(ids[None], labels[None], reduction="sum").detach()
            tokens += len(ids)
    found = objective.loss(model, batch).detach()
    assert relative_error(found, alone) <= OUTPUT[torch.float64]
    assert objective.counts(batch).tokens == tokens == int(batch.tokens)
    assert objective.counts(batch).labels == int((batch.labels >= 0).sum()) > 0


def test_no_conversation_changes_another_in_its_row(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    objective = objective_of(make_config(), tmp_path / "data")
    model = objective.build_model().double().eval()
    batch = objective.batch(0)
    start, end = batch.cu_seqlens.tolist()[1:3]
    ids = batch.input_ids.clone()
    ids[0, start:end] = torch.randint(256, (end - start,))
    one, other = (model(x, cu_seqlens=batch.cu_seqlens).logits for x in (batch.input_ids, ids))
    assert torch.equal(one[0, :start], other[0, :start])
    assert torch.equal(one[0, end:], other[0, end:])
    assert not torch.equal(one[0, start:end], other[0, start:end])


def test_answers_are_counted_across_borders() -> None:
    places = torch.tensor([2, 3, 6, 7, 8, 10])
    bounds = torch.tensor([0, 7, 12], dtype=torch.int32)
    assert answer_numbers(places, bounds).tolist() == [0, 0, 1, 2, 2, 3]


def finetuned(make_config: MakeConfig, *overrides: str) -> TrainResult:
    """A run that learns all its lines by heart."""
    fixed = ("train.steps=100", "data.heldout={lines}", "model.dropout=0.0", "train.eval_every=50")
    lines = make_config().data.paths[0]
    # Held out from itself nothing would be left: another file of the same lines.
    copy = Path(lines).with_name("again.jsonl")
    shutil.copy(lines, copy)
    given = [x.replace("{lines}", str(copy)) for x in fixed]
    return run_training(make_config(*given, *overrides))


def test_a_model_learns_answers_and_their_end(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finetuned(make_config)
    assert isinstance(result.last, InstructionReport)
    assert (result.first.exact, result.last.exact, result.last.ends) == (0.0, 1.0, 1.0)
    assert result.last.loss < 0.1 < result.first.loss
    rows = read_records(result.run_dir / "evaluations.jsonl")
    assert [list(row) for row in rows] == [REPORT] * 3
    assert [row["step"] for row in rows] == [0, 50, 100]
    steps = read_records(result.run_dir / "metrics.jsonl")
    assert "bits_per_byte" not in steps[0]

    tokenizer, model = load_tokenizer(result.checkpoint), load(result.run_dir)
    assert tokenizer.chat_template == TEMPLATES["released"]
    template = ChatTemplate(tokenizer.chat_template, tokenizer)
    asked = [template.encode([{"role": "user", "content": thing}]) for thing in COLOURS]
    answers = generate(model, [torch.tensor(ids) for ids in asked], max_new_tokens=9, temperature=0)
    list(answers)
    assert [tokenizer.decode(ids) for ids in answers.token_ids] == list(COLOURS.values())
    assert answers.finish_reasons == ["stop"] * len(COLOURS)

    from transnormer.cli.app import run

    spoken = iter(["sky", "sure?", "/reset", "snow", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(spoken))
    assert run(["chat", str(result.run_dir), "-t", "0", "-n", "9"]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == ["blue", "yes"]


@pytest.mark.parametrize("overrides", [(), LORA], ids=["full", "lora"])
def test_a_killed_run_resumes_exactly_and_without_its_sources(
    make_config: MakeConfig, tmp_path: Path, base: Path, overrides: tuple[str, ...]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    given = (*overrides, f"model.init_from={moved}", "train.save_every=2", "train.keep_last=0")
    whole = run_training(make_config(*given, f"output.dir={tmp_path / 'whole'}"))
    with pytest.raises(Crash):
        run_training(make_config(*given), progress=CrashAt(3))
    shutil.rmtree(moved)
    Path(make_config().data.paths[0]).unlink()
    resumed = run_training(make_config(*given), resume=True)
    assert_same_checkpoint(whole.checkpoint, resumed.checkpoint)
    scores = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_records(path)]
        for path in (whole.run_dir / "evaluations.jsonl", resumed.run_dir / "evaluations.jsonl")
    ]
    assert scores[0] == scores[1]


def test_data_of_a_run_that_changed_is_refused(make_config: MakeConfig) -> None:
    result = run_training(make_config("train.steps=1"))
    path = result.run_dir / "data" / "train" / "answers.npy"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"answers.npy has changed since the run began"):
        run_training(make_config("train.steps=2"), resume=True)


def test_segments_give_the_same_updates(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = ("model.dropout=0.0", "train.steps=2")
    whole = run_training(make_config(*plain))
    cut = make_config(*plain, "train.segment_tokens=24", f"output.dir={tmp_path / 'cut'}")
    losses = [
        [row["loss"] for row in read_records(result.run_dir / "metrics.jsonl")]
        for result in (whole, run_training(cut))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_share_is_held_out_by_group(make_config: MakeConfig, tmp_path: Path) -> None:
    lines = Path(make_config().data.paths[0])
    rows = [{**row, "group": number // 2} for number, row in enumerate(conversations())]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = objective_of(make_config("data.heldout=0.4"), tmp_path / "data")
    assert objective.heldout is not None
    assert (len(objective.train), len(objective.heldout)) == (6, 4)
    texts = [
        bytes(int(i) for i in source.conversation(index)[0] if i < 256).decode()
        for source in (objective.train, objective.heldout)
        for index in range(len(source))
    ]
    train, heldout = (
        {thing for thing in COLOURS for text in part if thing in text}
        for part in (texts[:6], texts[6:])
    )
    assert train.isdisjoint(heldout)


def test_lines_on_both_sides_are_told(make_config: MakeConfig, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    rows = [
        {"instruction": "sky!", "output": "blue", "group": 3},
        {"prompt": "a", "completion": "b"},
    ]
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: list[str] = []
    config = make_config(f"data.heldout={heldout}")
    InstructionObjective(Setting(config, tmp_path / "a", told.append, None, 0, 1))
    assert [line for line in told if line.startswith("1 held-out conversations stand in")]
    assert "heldout.jsonl:1" in told[0]
    objective_of(make_config("data.heldout=0"), tmp_path / "b")


def test_a_template_is_named_or_found_beside_the_model(
    make_config: MakeConfig, tmp_path: Path, base: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    source = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (own / "chat_template.jinja").write_text(source)
    found = objective_of(make_config(f"model.init_from={own}"), tmp_path / "a")
    assert found.tokenizer.chat_template == source
    named = make_config(f"model.init_from={own}", "objective.template=released")
    assert objective_of(named, tmp_path / "b").tokenizer.chat_template == TEMPLATES["released"]
    apart = make_config(f"model.init_from={own}", f"data.tokenizer={base}")
    assert objective_of(apart, tmp_path / "d").tokenizer.chat_template == source
    file = make_config(f"objective.template={own / 'chat_template.jinja'}")
    assert objective_of(file, tmp_path / "c").tokenizer.chat_template == source


def test_the_reserved_tokens_may_be_pieces_of_text() -> None:
    config = InstructionConfig(template="reserved")
    assert _template(config, pieces(add_dummy_prefix=False)).source == TEMPLATES["reserved"]


WRONG = {
    "no-model": (["model={model_dim=32,num_layers=1,heads=2,glu_dim=32}"], "init_from is missing"),
    "packing": (["data.packing=documents"], "data.packing is documents; expected it unset"),
    "eval-bytes": (["train.eval_bytes=9"], "train.eval_bytes is 9; expected it unset"),
    "embedded": (["data.path=embedded"], "data.path is 'embedded'; expected one path of JSON li"),
    "too-long": (["objective.too_long=wrap"], "too_long is 'wrap'; expected 'cut', 'drop' or 'er"),
    "template": (["objective.template=none"], "objective.template is 'none'; expected one of rel"),
    "new-tokenizer": (
        ["data.tokenizer=bpe:300"],
        "data.tokenizer is 'bpe:300'; expected the one of model.init_from",
    ),
    "no-reserved-token": (
        ["objective.template=reserved"],
        "the tokenizer has no <reserved_102> and <reserved_103>; expected the released models' voc",
    ),
    "no-room": (["data.seq=8", "train.tokens_per_step=8"], "all 8 conversations have more than"),
    "named": (
        ["data.seq=16", "train.tokens_per_step=16", "objective.too_long=error"],
        r"lines.jsonl:1 has \d+ tokens; expected at most 17",
    ),
    "muon": (["lora.rank=2", "optimizer.name=muon"], r"optimizer.name is 'muon' beside \[lora\]"),
    "rank": (["lora.rank=0"], "lora.rank is 0"),
    "targets": (
        ["lora.rank=2", "lora.targets=['q_proj']"],
        r"lora.targets\[0\] is 'q_proj'; expected some of down_proj, gate_proj, out_proj, qkvu_pr",
    ),
    "lora-alone": (
        ["lora.rank=2", "objective.kind=causal"],
        r"objective.kind is 'causal' beside \[lora\]; expected 'instruction'",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_cannot_be_trained_is_refused_in_one_line(make_config: MakeConfig, name: str) -> None:
    overrides, message = WRONG[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        run_training(make_config(*overrides))
    assert "\n" not in str(found.value)


def test_a_template_that_is_no_text_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_bytes(b"{{ eos_token }}\xff")
    with pytest.raises(ValueError, match=r"own.jinja', which is not UTF-8 at byte 15"):
        objective_of(make_config(f"objective.template={file}"), tmp_path / "a")


def test_adapters_begin_as_the_base_and_train_alone(
    make_config: MakeConfig, tmp_path: Path, base: Path
) -> None:
    result = run_training(make_config(*LORA, "train.steps=2", "train.save_every=1"))
    full = run_training(make_config("train.steps=1", f"output.dir={tmp_path / 'full'}"))
    assert result.first.loss == full.first.loss
    model = load(base)
    add_adapters(model, LoraConfig(rank=4), "base")
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert len(trained) == 2 * 2 * 5
    assert all(".lora_" in name for name in trained)
    # A of each has rank x inputs, B outputs x rank: qkvu, out, gate, up, down.
    widths = [(48, 192), (48, 48), (48, 64), (48, 64), (64, 48)]
    frozen = load(base)
    sizes = frozen.num_parameters(), 2 * sum(4 * (a + b) for a, b in widths)
    assert describe_size(frozen) == f"{sizes[0]:,} parameters"
    assert describe_size(model) == (f"{sum(sizes):,} parameters, {sizes[1]:,} of them trained,")
    before, after = load(base).state_dict(), load(result.run_dir).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_every_adapter_changes_the_model(base: Path) -> None:
    ids = torch.arange(12)[None]
    exact = load(base)(ids).logits
    for target in ("qkvu_proj", "out_proj", "gate_proj", "up_proj", "down_proj"):
        model = load(base)
        add_adapters(model, LoraConfig(rank=2, targets=(target,)), "base")
        assert torch.equal(model(ids).logits, exact)
        for name, x in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(x)
        assert not torch.allclose(model(ids).logits, exact, atol=1e-4), target


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_the_adapter_and_merges_it_to_the_same_model(
    make_config: MakeConfig, base: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import transnormer.hf  # noqa: F401 - registers the classes

    result = run_training(make_config(*LORA, "train.steps=3"))
    ids = torch.arange(12)[None]
    exact = load(result.run_dir)(ids).logits
    outer = AutoModelForCausalLM.from_pretrained(base)
    plain = outer(ids).logits
    assert not torch.allclose(plain, exact, atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(outer, result.checkpoint / "adapter")
    found = adapted.eval()(ids).logits
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)
    merged = adapted.merge_and_unload()
    tensors = load(result.run_dir).state_dict()
    for name, x in merged.model.transnormer.state_dict().items():
        if name in tensors:
            torch.testing.assert_close(x, tensors[name], msg=name)
    own = load(base)
    merge_adapter(own, result.checkpoint / "adapter")
    for name, x in own.state_dict().items():
        torch.testing.assert_close(x, tensors[name], msg=name)
    again = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    torch.testing.assert_close(again(ids).logits, exact)
