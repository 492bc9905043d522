"""Two GPUs over NCCL compute what one does: layouts, exchanges of states, segments, whole runs."""

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from nccl_cases import joint_parts_on_gpus, parts_on_gpus, run_on_gpus, segments_on_gpus, sums
from nn.mixer_cases import CASES, VOCAB, ids_of
from parallel_cases import model_whole, train
from ranks import Ranks
from segment_cases import whole
from tolerances import LAYOUT_FLOAT64, RELAID_LOSS_GPU, SEGMENTS, SEQUENCE_PARALLEL, assert_close
from train_cases import constant_evaluation, tiny_run

from transnormer.models import zoo
from transnormer.models.decoder import Decoder
from transnormer.optim import OptimizerConfig
from transnormer.parallel.mesh import Axes
from transnormer.train import RunConfig, run_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are not there"),
    # The compiler looks at the field of every tensor that it is given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

CONFIG = zoo.tnl_custom(vocab_size=23, model_dim=16, num_layers=2, heads=4, glu_dim=12)
# Clips every step.
ADAMW = OptimizerConfig(lr=1e-2, clip=0.05)
MUON = OptimizerConfig(name="muon", lr=1e-2, clip=0.05)
LAYOUTS = [Axes(dp_shard=2), Axes(dp_replicate=2), Axes(sp=2), Axes(tp=2)]
EXCHANGES: list[dict[str, Any]] = [
    {"exchange": "gather"},
    {"exchange": "gather", "overlap": True},
    {"exchange": "ring"},
    {"exchange": "scan"},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A process for each of two GPUs."""
    pool = Ranks(2, tmp_path_factory.mktemp("pair"), backend="nccl")
    yield pool
    pool.close()


def model_of(name: str) -> Decoder:
    case = next(case for case in CASES if case.name == name)
    return case.model(torch.float64).train()


def batch_of() -> dict[str, Any]:
    ids, labels = ids_of(2, 41), ids_of(2, 41, 7)
    labels[0, 3], labels[1, 8:24] = -100, -100
    return {"input_ids": ids, "labels": labels}


@cache
def alone(optimizer: OptimizerConfig) -> dict[str, Any]:
    """What one GPU finds; found once."""
    return train(None, CONFIG, Axes(), None, range(2), optimizer, device="cuda")


def test_the_pair_sums_over_nccl(pair: Ranks) -> None:
    assert pair.run(2, sums) == [("nccl", 3.0)] * 2


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("axes", LAYOUTS, ids=["dp_shard", "dp_replicate", "sp", "tp"])
def test_every_layout_trains_as_one_gpu(
    pair: Ranks, axes: Axes, optimizer: OptimizerConfig
) -> None:
    found = pair.run(2, train, CONFIG, axes, None, range(2), optimizer, 2, "cuda")[0]
    exact = alone(optimizer)
    for name in ("loss", "norm"):
        assert_close(found[name], exact[name], limit=LAYOUT_FLOAT64, name=name)
    for group in ("model", "optimizer"):
        for name, expected in exact[group].items():
            limit = LAYOUT_FLOAT64
            assert_close(found[group][name], expected.cpu(), limit=limit, name=f"{group} {name}")


@pytest.mark.parametrize("options", EXCHANGES, ids=["gather", "overlap", "ring", "scan"])
def test_every_exchange_of_states_has_the_gradients_of_one_gpu(
    pair: Ranks, options: dict[str, Any]
) -> None:
    model, batch = model_of("lightning"), batch_of()
    exact = model_whole(model, batch)
    for found in pair.run(2, parts_on_gpus, model, batch, options):
        for name, expected in exact.items():
            assert_close(found[name], expected, limit=SEQUENCE_PARALLEL, name=name)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("heads", [4, 2], ids=["dim64", "dim128"])
def test_the_joint_op_in_parts_errs_as_on_one_gpu(pair: Ranks, heads: int, compiled: bool) -> None:
    torch.manual_seed(0)
    # LRPE is in the first layer alone: the other two are joint.
    model = Decoder(
        zoo.tnl_custom(vocab_size=VOCAB, model_dim=256, num_layers=3, heads=heads, glu_dim=256)
    )
    batch = {"input_ids": ids_of(2, 5200), "labels": ids_of(2, 5200, 7)}
    there = {name: x.cuda() for name, x in batch.items()}
    exact = model_whole(copy.deepcopy(model).double().cuda(), there)
    alone, _ = joint_parts_on_gpus(None, model, batch, None, compiled)
    # A part of one segment, and one of several.
    lengths = (700, 4500)
    for found, calls in pair.run(2, joint_parts_on_gpus, model, batch, lengths, compiled):
        assert calls == 2
        assert_close(found["loss"], alone["loss"], limit=RELAID_LOSS_GPU, name="loss")
        for name, expected in exact.items():
            if name != "loss":
                assert_close(found[name], expected.cpu(), alone[name], name=name)


@pytest.mark.parametrize("name", ["softmax", "lightnet", "eos"])
def test_keys_and_states_of_other_kinds_pass_over_nccl(pair: Ranks, name: str) -> None:
    model, batch = model_of(name), batch_of()
    exact = model_whole(model, batch)
    for found in pair.run(2, parts_on_gpus, model, batch, {}):
        for part, expected in exact.items():
            assert_close(found[part], expected, limit=SEQUENCE_PARALLEL, name=part)


def test_segments_on_both_gpus_have_the_gradients_of_whole_sequences(pair: Ranks) -> None:
    model, batch = model_of("lightning"), batch_of()
    exact = whole(model, batch)
    for found in pair.run(2, segments_on_gpus, model, batch, 8):
        for name, expected in exact.items():
            assert_close(found[name], expected, limit=SEGMENTS, name=name)


def losses(run_dir: Path) -> list[float]:
    """The losses of a run, step by step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def run_of(folder: Path, name: str, *overrides: str) -> RunConfig:
    plain = ("model.dropout=0.0", "optimizer.schedule=constant", "train.device=cuda")
    return tiny_run(folder, *plain, f"output.dir={folder / name}", *overrides)


def test_a_run_goes_on_from_layout_to_layout(pair: Ranks, tmp_path: Path) -> None:
    exact = run_training(run_of(tmp_path, "alone"), evaluate=constant_evaluation)
    stages = ("parallel.dp_shard=2", "parallel.sp=2", "parallel.tp=2")
    for number, stage in enumerate(stages, 1):
        config = run_of(tmp_path, "many", stage, f"train.steps={2 * number}")
        assert pair.run(2, run_on_gpus, config, number > 1) == [2 * number] * 2
    assert len(losses(exact.run_dir)) == 6
    for a, b in zip(losses(tmp_path / "many"), losses(exact.run_dir), strict=True):
        assert abs(a - b) <= RELAID_LOSS_GPU * abs(b)


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.sp=2", "train.segment_tokens=4", "train.precision=bfloat16"),
        ("parallel.dp_replicate=2", "parallel.outer.method=co2", "parallel.outer.tau=2"),
        (
            "parallel.tp=2",
            "train.precision=bfloat16",
            "train.weights=bfloat16",
            "optimizer.states=bfloat16",
        ),
        ("optimizer.name=muon", "train.precision=bfloat16", "train.save_async=true"),
        ("objective.kind=masked", "model.causal=false", "train.precision=bfloat16"),
    ],
    ids=["segments", "co2", "bfloat16", "muon", "masked"],
)
def test_whole_runs_train_on_both_gpus(
    pair: Ranks, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    assert pair.run(2, run_on_gpus, run_of(tmp_path, "many", *overrides), False) == [6, 6]
    found = losses(tmp_path / "many")
    assert found[-1] < found[0]
