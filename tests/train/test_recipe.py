"""Run configurations: the tables of the TOML file and what they refuse."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import train_cases

from transnormer.config import validate
from transnormer.models import checkpoint
from transnormer.models.decoder import Decoder
from transnormer.train import RunConfig, read_run, run_training

RECIPES = Path(__file__).parents[2] / "recipes"
IDS = {"pad": 256, "bos": 257, "eos": 258}
MakeConfig = Callable[..., RunConfig]


# Those of corpus cleaning are configurations of another command, which has a test of its own.
RUNS = [path for path in sorted(RECIPES.glob("*.toml")) if not path.stem.startswith("clean_")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    config = read_run(path)
    if config.model.init_from is None:
        assert config.model.build(64_000, **IDS).vocab_size == 64_000
    else:
        assert config.objective.kind == "instruction"


@pytest.mark.parametrize("stem", ["quickstart", "tinyshakespeare"])
def test_small_recipes_have_at_most_3_million_parameters(stem: str) -> None:
    config = read_run(RECIPES / f"{stem}.toml")
    assert Decoder(config.model.build(259, **IDS)).num_parameters() <= 3_000_000


def test_a_run_survives_json(make_config: MakeConfig) -> None:
    config = make_config("model.dropout=0", "data.heldout=0.25")
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_models_have_three_forms(make_config: MakeConfig) -> None:
    sizes = make_config().model.build(259, **IDS)
    assert (sizes.model_dim, len(sizes.blocks), sizes.dropout) == (32, 2, 0.1)
    assert (sizes.pad_token_id, sizes.bos_token_id, sizes.eos_token_id) == (256, 257, 258)
    inline = {"model_dim": 32, "blocks": [block.model_dump() for block in sizes.blocks]}
    data = {**make_config().model_dump(), "model": inline}
    assert RunConfig.model_validate(data).model.build(259, **IDS).blocks == sizes.blocks
    data = {**make_config().model_dump(), "model": {"name": "tnl-385m"}}
    assert len(RunConfig.model_validate(data).model.build(259, **IDS).blocks) == 24


def test_a_vocabulary_may_be_padded_but_not_cut(make_config: MakeConfig) -> None:
    assert make_config("model.vocab_size=320").model.build(259, **IDS).vocab_size == 320
    with pytest.raises(ValueError, match="model.vocab_size is 258; expected at least .* 259"):
        make_config("model.vocab_size=258").model.build(259, **IDS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=1", r"train.stesp is an unknown key; .*did you mean steps"),
        ("train.steps=1.5", r"train.steps is 1.5; expected an integer"),
        ("train.steps=0", r"train.steps is 0; expected: .*greater than or equal to 1"),
        ("train.tokens_per_step=65", r"train.tokens_per_step is 65; expected a multiple of .* 16"),
        ("train.micro_batch=3", r"train.micro_batch is 3; expected a divisor of the 4 samples"),
        ("train.precision=fp8", r"train.precision is 'fp8'; expected 'auto'"),
        ("model.name=tnl-9b", r"model has .*; expected name alone"),
        ("model.heads=none", r"model.heads is 'none'; expected an integer"),
        ("data.heldout=1.0", r"data.heldout is 1.0; expected a share"),
        ("data.heldout=", r"data.heldout is ''; expected a share"),
        ("data.weights=[1.0, 2.0]", r"data.weights is \[1.0, 2.0\]; expected one positive number"),
        ("data.weights=[0.0]", r"data.weights\[0\] is 0.0; expected a finite number above 0"),
        ("data.epochs=[1.0, 2.0]", r"data.epochs is \[1.0, 2.0\]; expected one positive number"),
        ("data.epochs=[-1.0]", r"data.epochs\[0\] is -1.0; expected a finite number above 0"),
        ("data.weights=[inf]", r"data.weights\[0\] is inf; expected a finite number above 0"),
        ("data.heldout=[1]", r"data.heldout is \(1,\); expected a number or a string \(test\)"),
        ("data.path=3", r"data.path is 3; expected a string or a list \(test\)"),
        ("data.path=[3]", r"data.path is \(3,\); expected a string; 1 more \(test\)"),
        ("model.heads=3", r"model.heads is 3; expected a divisor of model_dim, .* 32 \(test\)"),
        ("model.init_std=inf", r"model.init_std is inf; expected a finite number"),
        ("optimizer.weight_decay=inf", r"optimizer.weight_decay is inf; expected a finite number"),
        ("optimizer.eps=inf", r"optimizer.eps is inf; expected a finite number"),
        ("optimizer.clip=inf", r"optimizer.clip is inf; expected a finite number"),
        ("data.seq=0", r"data.seq is 0"),
        ("data.path=", r"data.path is ''; expected a path"),
        ("optimizer.schedule=linear", r"optimizer.schedule is 'linear'; expected 'cosine'"),
        ("optimizer.lr=0", r"optimizer.lr is 0"),
        ("output.dir=", r"output.dir is ''"),
        ("parallel.pp=2", r"parallel.pp is an unknown key"),
        ("parallel.tp_residual=cut", r"tp_residual is 'cut' where tp is 1; expected tp of at"),
        ("parallel.sp_exchange=ring", r"sp_exchange is 'ring' where sp is 1; expected sp of at"),
        ("parallel.sp_overlap=true", r"sp_overlap is True where sp is 1; expected sp of at least"),
    ],
)
def test_mistakes_name_the_key(make_config: MakeConfig, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_config(override)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused(make_config: MakeConfig) -> None:
    data = {**make_config().model_dump(), "model": {"name": "tnl-9b"}}
    with pytest.raises(
        ValueError, match="name is 'tnl-9b'; expected a published size.*did you mean .*tnl-"
    ):
        RunConfig.model_validate(data)


def test_blocks_that_cannot_be_built_are_named_before_anything_is_read(tmp_path: Path) -> None:
    block = {
        "token_mixer": {"kind": "lightning", "heads": 2},
        "channel_mixer": {"kind": "glu", "hidden_dim": 8},
    }
    bad = {**block, "token_mixer": {"kind": "lightning", "heads": 3}}
    data = train_cases.tiny_run(tmp_path).model_dump()
    for blocks, message in (
        ([block, bad], r"model.blocks\[1\] cannot be built: heads is 3; .* of 8 \(run.toml\)"),
        ([], r"model.blocks is \(\); expected.*\(run.toml\)"),
    ):
        wrong = {**data, "model": {"model_dim": 8, "blocks": blocks}}
        with pytest.raises(ValueError, match=message) as caught:
            validate(RunConfig, wrong, source="run.toml")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", ["dp_replicate", "dp_shard", "sp", "tp"])
def test_more_ranks_than_processes_are_refused(make_config: MakeConfig, axis: str) -> None:
    with pytest.raises(ValueError, match="2 ranks; expected as many as the 1 processes"):
        run_training(make_config(f"parallel.{axis}=2"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.segment_tokens=4", "parallel.tp=2"], "train.segment_tokens is 4"),
        (
            ["train.compile=true", "parallel.sp=2", "train.checkpointing=full"],
            "train.checkpointing is 'full'",
        ),
        (["train.cuda_graph=true", "model.dropout=0"], "train.cuda_graph is True"),
    ],
)
def test_what_one_process_alone_can_do_is_refused(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(NotImplementedError, match=message):
        run_training(make_config(*overrides))
    assert not Path(make_config().output.dir).exists()


def test_width_transfer_starts_from_its_own_values(make_config: MakeConfig, tmp_path: Path) -> None:
    untied = ("model.tie_embeddings=false", "train.steps=1", "optimizer.lr=1e-30")
    plain = run_training(make_config(*untied, f"output.dir={tmp_path / 'plain'}"))
    config = make_config(*untied, "optimizer.base_dim=8", f"output.dir={tmp_path / 'scaled'}")
    scaled = checkpoint.load(run_training(config).run_dir)
    head = checkpoint.load(plain.run_dir).lm_head.weight / 4
    assert torch.equal(scaled.lm_head.weight, head)
    with pytest.raises(ValueError, match="base_dim is 8 and tie_embeddings true"):
        run_training(make_config("optimizer.base_dim=8"))
    data = make_config().model_dump()
    data["model"], data["optimizer"]["base_dim"] = {"init_from": str(plain.run_dir)}, 8
    with pytest.raises(ValueError, match="optimizer.base_dim is 8 beside model.init_from"):
        RunConfig.model_validate(data)
