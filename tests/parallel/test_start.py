"""A run on several processes begins as one on one process, and none of them holds the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nn.mixer_cases import CASES, DIM
from ranks import Ranks
from start_cases import begin
from torch import Tensor
from train_cases import tiny_run

from transnormer.models import checkpoint, zoo
from transnormer.models.checkpoint import AnyConfig
from transnormer.models.classifier import ClassifierConfig
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.train import RunConfig
from transnormer.train.lora_config import LoraConfig

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "copies4": {"dp_replicate": 4},
    "copies2-dp2": {"dp_replicate": 2},
    "copies2-tp2": {"dp_replicate": 2, "tp": 2},
    "dp2-tp2": {"tp": 2, "tp_residual": "cut"},
    "sp4": {"sp": 4},
    "local4": {"dp_replicate": 4, "outer.method": "co2", "outer.tau": 2},
    "local2-dp2": {"dp_replicate": 2, "outer.method": "co2", "outer.tau": 2},
}
# Angles and decays that keep their precision, fused projections, buffers, and initial values that
# mixers draw for themselves when all projections are drawn.
MIXERS = ("lightning-low-rank-gate", "hgrn1", "retention", "gau", "tpe")


def hybrid(**changes: Any) -> DecoderConfig:
    blocks = tuple(block for case in CASES if case.name in MIXERS for block in case.blocks[:1])
    return DecoderConfig(vocab_size=23, model_dim=DIM, blocks=blocks, **changes)


def run_of(folder: Path, axes: dict[str, Any], *overrides: str) -> RunConfig:
    table = (f"parallel.{key}={value}" for key, value in axes.items())
    return tiny_run(folder, *table, *overrides)


def from_files(run: RunConfig, source: Path) -> RunConfig:
    model = type(run.model).model_validate({"init_from": str(source)})
    return run.model_copy(update={"model": model})


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_begins_with_the_weights_of_one_process(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    run = run_of(tmp_path, LAYOUTS[name])
    check(ranks, run, hybrid(pad_token_id=3, tie_embeddings="tp" in name))


def mostly_slow(*often: str) -> list[Any]:
    """Both layouts of every "HOW-LAYOUT", of which each of HOW is begun often in one alone."""
    pairs = [(pair.split("-")[0], name) for pair in often for name in ("dp4", "dp2-tp2")]
    return [
        pytest.param(
            how,
            name,
            id=f"{how}-{name}",
            marks=() if f"{how}-{name}" in often else pytest.mark.slow,
        )
        for how, name in pairs
    ]


@pytest.mark.parametrize(
    ("how", "name"),
    mostly_slow("scaled-dp2-tp2", "bfloat16-dp4", "rest-dp2-tp2", "compiled-dp2-tp2"),
)
def test_scaled_and_rounded_models_begin_with_the_weights_of_one_process(
    ranks: Ranks, tmp_path: Path, name: str, how: str
) -> None:
    overrides = {
        "scaled": ["optimizer.base_dim=8", "model.tie_embeddings=false"],
        "bfloat16": [
            "train.weights=bfloat16",
            "optimizer.states=bfloat16",
            "train.precision=bfloat16",
        ],
        "rest": ["train.weights=bfloat16", "train.precision=bfloat16"],
        "compiled": ["train.compile=true"],
    }[how]
    check(
        ranks, run_of(tmp_path, LAYOUTS[name], *overrides), hybrid(tie_embeddings=how != "scaled")
    )


def test_a_classifier_begins_with_the_weights_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    config = ClassifierConfig(backbone=hybrid(tie_embeddings=True), num_classes=3)
    check(ranks, run_of(tmp_path, LAYOUTS["dp4"]), config)


@pytest.mark.parametrize(
    ("kind", "name"),
    mostly_slow(
        "decoder-dp4", "classifier-dp2-tp2", "adapters-dp4", "split-dp2-tp2", "rounded-dp4"
    ),
)
def test_a_run_begins_with_the_weights_of_files(
    ranks: Ranks, tmp_path: Path, name: str, kind: str
) -> None:
    """split: float32 weights of files in two halves; rounded: those of bfloat16 ones, without a rest."""
    torch.manual_seed(8)
    decoder = hybrid()
    dtype = torch.bfloat16 if kind == "rounded" else torch.float32
    checkpoint.save(Decoder(decoder).to(dtype), tmp_path / "source")
    half = ["train.weights=bfloat16", "train.precision=bfloat16"]
    overrides = half if kind in ("split", "rounded") else []
    run = from_files(run_of(tmp_path, LAYOUTS[name], *overrides), tmp_path / "source")
    if kind == "adapters":
        run = run.model_copy(update={"lora": LoraConfig(rank=2)})
    config: AnyConfig = decoder
    if kind == "classifier":
        config = ClassifierConfig(backbone=decoder, num_classes=3)
    check(ranks, run, config)


def test_a_rank_holds_its_share_and_a_block(ranks: Ranks, tmp_path: Path) -> None:
    # 16 blocks of a sixteenth each; the embedding is smaller.
    deep = zoo.tnl_custom(vocab_size=8, model_dim=32, num_layers=16, heads=4, glu_dim=32)
    for name in ("dp4", "dp2-tp2"):
        run = run_of(tmp_path, LAYOUTS[name])
        whole = begin(None, run, deep)["kept"]
        for result in ranks.run(4, begin, run, deep):
            assert result["held"] < (1 / 4 + 1 / 16 + 0.02) * whole


@pytest.mark.parametrize("how", ["init_from", "resumed", "adapters"])
def test_a_rank_that_reads_files_holds_its_share(ranks: Ranks, tmp_path: Path, how: str) -> None:
    deep = zoo.tnl_custom(vocab_size=8, model_dim=32, num_layers=16, heads=4, glu_dim=32)
    checkpoint.save(Decoder(deep), tmp_path / "source")
    run, found = run_of(tmp_path, LAYOUTS["dp4"]), None
    if how == "resumed":
        found = tmp_path / "source"
    else:
        run = from_files(run, tmp_path / "source")
    if how == "adapters":
        run = run.model_copy(update={"lora": LoraConfig(rank=1)})
    whole = begin(None, run, deep)["kept"]
    for result in ranks.run(4, begin, run, deep, found):
        assert result["held"] < (1 / 4 + 1 / 16 + 0.02) * whole


def check(ranks: Ranks, run: RunConfig, config: AnyConfig) -> None:
    exact = begin(None, run, config)
    results = ranks.run(4, begin, run, config)
    same(results[0]["model"], exact["model"])
    for result in results:
        same(result["buffers"], exact["buffers"])
        # Dropout of ranks that share layers goes on as one process's.
        assert torch.equal(result["random"], exact["random"])


def same(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert found.keys() == exact.keys()
    for name, x in exact.items():
        assert found[name].dtype == x.dtype, name
        assert torch.equal(found[name], x), name
