"""Training features with the kernels that a GPU runs: segments, checkpointing, compiled blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import make_ids, make_model, tnl_config
from tolerances import GPU_GRAPH, GPU_SEGMENTS, RESIDUAL_LOSS
from torch import Tensor
from train_cases import Notes, tiny_run

from transnormer.bench.parts import ATTENTION, LOSS, MATMULS
from transnormer.bench.train import bench_train
from transnormer.models import zoo
from transnormer.models.compilation import compile_blocks
from transnormer.models.decoder import Decoder
from transnormer.models.recompute import set_checkpointing
from transnormer.models.segments import backward_in_segments
from transnormer.train import run_training

pytestmark = [
    pytest.mark.gpu,
    # The compiler looks at the field of every tensor that it is given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
BOUNDS = torch.tensor([0, 100, 700, 701, 1500, 2048], dtype=torch.int32)


def model_of_64() -> Decoder:
    """Heads of 64, which the kernels take, in float32."""
    config = zoo.tnl_custom(vocab_size=61, model_dim=128, num_layers=3, heads=2, glu_dim=128)
    return make_model(config.model_copy(update={"init_std": 0.05})).cuda()


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {name: x.grad.double() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def assert_near(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert found.keys() == exact.keys()
    for name, x in exact.items():
        assert (found[name] - x).norm() <= GPU_SEGMENTS * x.norm(), name


@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["row", "packed"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_segments_give_the_whole_gradient(compiled: bool, mode: Any, bounds: Tensor | None) -> None:
    model, ids = model_of_64(), make_ids(1, 2048).cuda()
    packed = None if bounds is None else bounds.cuda()
    model.loss(ids, ids, reduction="sum", cu_seqlens=packed).backward()
    exact = gradients(model)
    set_checkpointing(model, mode)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model)
    model.loss(ids, ids, reduction="sum", cu_seqlens=packed).backward()
    assert_near(gradients(model), exact)
    backward_in_segments(model, ids, ids, segment_tokens=600, cu_seqlens=bounds)
    assert_near(gradients(model), exact)


def test_memory_does_not_grow_with_the_segments() -> None:
    model, peaks = model_of_64(), []
    for count in (4, 32):
        ids = make_ids(1, 4096 * count).cuda()
        backward_in_segments(model, ids[:, :4096], ids[:, :4096], segment_tokens=4096)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        backward_in_segments(model, ids, ids, segment_tokens=4096)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    states = 28 * sum(x.nbytes for x in model.empty_state(1).layers)
    assert peaks[1] <= 1.05 * peaks[0] + states


def test_checkpointing_keeps_less() -> None:
    peaks = {}
    for mode in ("none", "selective", "full"):
        model, ids = make_model(tnl_config()).cuda(), make_ids(4, 4096).cuda()
        set_checkpointing(model, mode)
        before = torch.cuda.memory_allocated()
        loss = model.loss(ids, ids)
        peaks[mode] = torch.cuda.memory_allocated() - before
        loss.backward()
    assert peaks["full"] < 0.5 * peaks["selective"] < 0.4 * peaks["none"]


def test_a_profile_has_kernels_and_memory(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "train.device=cuda", "profile.steps=[3, 4]")
    run = run_training(config, progress=Notes()).run_dir
    assert (run / "profile" / "memory.pickle").stat().st_size > 0
    table = (run / "profile" / "costliest.txt").read_text()
    assert len(table.splitlines()) == 11
    assert "aten::" not in table


@pytest.mark.parametrize("override", ["train.compile=false", "train.compile=true"])
def test_the_time_of_every_part_is_found(tmp_path: Path, override: str) -> None:
    size = (
        "model.model_dim=128",
        "model.glu_dim=128",
        "data.seq=256",
        "train.tokens_per_step=1024",
    )
    config = tiny_run(tmp_path, *size, override, "train.device=cuda", "train.precision=bfloat16")
    found = bench_train(config, steps=2, warmup=2)
    times = {part.part: part.milliseconds for part in found.parts}
    assert min(times[ATTENTION], times[MATMULS], times[LOSS]) > 0
    assert found.memory is not None


def test_a_run_with_all_of_it_learns(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path,
        "train.device=cuda",
        "train.precision=bfloat16",
        "train.weights=bfloat16",
        "optimizer.states=bfloat16",
        "train.compile=true",
        "train.checkpointing=selective",
        "train.segment_tokens=8",
        "guard.action=rollback",
        "train.steps=60",
        "optimizer.warmup=5",
    )
    run_training(config, progress=(notes := Notes()))
    assert notes.steps[-1].loss < notes.steps[0].loss - 1.0


@pytest.mark.parametrize("compiled", ["false", "true"], ids=["eager", "compiled"])
@pytest.mark.parametrize("micro_batch", [4, 1], ids=["one-part", "four-parts"])
def test_a_captured_step_is_the_plain_one(tmp_path: Path, micro_batch: int, compiled: str) -> None:
    found = {}
    for name in ("false", "true"):
        torch._dynamo.reset()
        config = tiny_run(
            tmp_path,
            "train.device=cuda",
            "train.precision=bfloat16",
            "train.residual=bfloat16",
            f"train.compile={compiled}",
            f"train.cuda_graph={name}",
            f"train.micro_batch={micro_batch}",
            "train.steps=8",
            "train.save_every=4",
            "model.dropout=0",
            "guard.action=skip",
            f"output.dir={tmp_path / name}",
        )
        run_training(config, progress=(notes := Notes()))
        found[name] = [(report.loss, report.grad_norm) for report in notes.steps]
    # The embedding's gradient is summed by atomics, in any order.
    assert torch.tensor(found["true"]).sub(torch.tensor(found["false"])).abs().max() < GPU_GRAPH


@pytest.mark.parametrize("states", ["adamw", "muon", "bfloat16", "weights", "all"])
def test_every_optimizer_works_beside_a_captured_pass(tmp_path: Path, states: str) -> None:
    optimizer = {
        "adamw": ["optimizer.name=adamw"],
        "muon": ["optimizer.name=muon"],
        "bfloat16": ["optimizer.states=bfloat16"],
        "weights": ["train.weights=bfloat16", "train.micro_batch=1", "train.compile=true"],
        "all": ["train.weights=bfloat16", "optimizer.states=bfloat16"],
    }[states]
    config = tiny_run(
        tmp_path,
        "train.device=cuda",
        "train.cuda_graph=true",
        "train.precision=bfloat16",
        "train.steps=40",
        "model.dropout=0",
        "guard.action=rollback",
        "guard.snapshot_every=10",
        *optimizer,
    )
    run_training(config, progress=(notes := Notes()))
    assert notes.steps[-1].loss < notes.steps[0].loss - 0.5


def test_a_fast_run_follows_the_plain_one_for_200_steps(tmp_path: Path) -> None:
    found = {}
    fast = (
        "train.compile=true",
        "train.residual=bfloat16",
        "train.weights=bfloat16",
        "train.activation_memory=0.9",
        "train.cuda_graph=true",
    )
    for name, settings in (("plain", ()), ("fast", fast)):
        torch._dynamo.reset()
        config = tiny_run(
            tmp_path,
            "train.device=cuda",
            "train.precision=bfloat16",
            "train.steps=200",
            "model.dropout=0",
            "model.model_dim=128",
            "data.seq=128",
            "train.tokens_per_step=2048",
            # Little enough that runs do not leave each other by rounding alone: at 3e-4 bfloat16
            # and float32 runs of plain code differ by 5e-3.
            "optimizer.lr=1e-4",
            *settings,
            f"output.dir={tmp_path / name}",
        )
        run_training(config, progress=(notes := Notes()))
        found[name] = [report.loss for report in notes.steps]
    assert found["fast"] == pytest.approx(found["plain"], rel=RESIDUAL_LOSS)
