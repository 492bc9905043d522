"""`bench train`: times add up, parts are told apart, floors are those of the model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from train_cases import tiny_run
from typer.testing import CliRunner

from transnormer.bench.parts import (
    ATTENTION,
    ELEMENTS,
    IDLE,
    LOSS,
    MATMULS,
    OPTIMIZER,
    PARTS,
    Floor,
    floors,
    part_of,
    time_by_part,
)
from transnormer.bench.train import bench_train
from transnormer.cli.app import app
from transnormer.cli.bench import describe
from transnormer.data import tokenize_corpus
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder
from transnormer.models.device_peaks import Peak
from transnormer.ops.adamw.triton_adamw import adamw_kernel
from transnormer.optim.optimizers import Optimizer
from transnormer.train.objectives import Objective

RECIPE = """
[model]
model_dim = 32
num_layers = 2
heads = 2
glu_dim = 32
[data]
path = "nowhere.txt"
seq = 16
[train]
steps = 2
tokens_per_step = 64
micro_batch = 2
precision = "float32"
device = "cpu"
[output]
dir = "never-made"
"""


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mm", "transnormer::linear_cross_entropy_backward"], LOSS),
        (["aten::mul", "Optimizer.step#AdamW.step"], OPTIMIZER),
        (["aten::bmm", "transnormer::chunked_linear_attention"], ATTENTION),
        (["transnormer::constant_decay_attention_backward"], ATTENTION),
        (["aten::_scaled_dot_product_flash_attention"], ATTENTION),
        (["aten::addmm", "aten::linear"], MATMULS),
        (["triton_poi_fused_silu_0", "CompiledFunction"], ELEMENTS),
    ],
)
def test_a_part_is_known_by_the_names_around(names: list[str], part: str) -> None:
    assert part_of(names) == part


def event(name: str, cpu: float, gpu: float = 0.0, parent: object = None, kernel: bool = False):
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA if kernel else DeviceType.CPU,
        self_cpu_time_total=cpu,
        self_device_time_total=gpu,
        is_user_annotation=name == "annotation",
        cpu_parent=parent,
    )


def test_times_add_up_to_the_wall() -> None:
    loss = event("transnormer::linear_cross_entropy", 1000)
    events = [
        loss,
        event("aten::mm", 2000, 700, loss),
        event("aten::mm", 3000, 500),
        event("gemm", 0, 1200, kernel=True),
        event("triton_poi_fused_silu_0", 0, 300, kernel=True),
        event(adamw_kernel.__name__, 0, 400, kernel=True),
        event("annotation", 0, 9000, kernel=True),
    ]
    cpu = time_by_part(events, 10.0, torch.device("cpu"))
    assert (cpu[LOSS], cpu[MATMULS], cpu[IDLE]) == (3.0, 3.0, 4.0)
    gpu = time_by_part(events, 10.0, torch.device("cuda"))
    assert (gpu[LOSS], gpu[MATMULS]) == (0.7, 0.5)
    assert gpu[OPTIMIZER] == 0.4
    assert (gpu[ELEMENTS], gpu[IDLE]) == pytest.approx((0.3, 8.1))


def test_a_floor_is_the_longer_of_arithmetic_and_bytes() -> None:
    peak = Peak(bfloat16=4e12, float32=1e12, bandwidth=1e9)
    assert Floor(2e12, 1e9).milliseconds(peak, "float32") == 2000.0
    assert Floor(2e12, 1e9).milliseconds(peak, "bfloat16") == 1000.0


def test_floors_are_those_of_the_model(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    model = Decoder(config.model.build(64, pad=None, bos=None, eos=None))
    found = floors(model, 100, 8, "float32")
    flops = ModelCost.of(model.config).flops(8)
    assert sum(floor.flops for floor in found.values()) == 100 * 3 * flops.total
    assert found[OPTIMIZER].bytes == 28 * model.num_parameters()
    assert found[ATTENTION].bytes == 100 * 2 * 11 * 32 * 4
    assert found[ELEMENTS].bytes == 100 * 2 * 3 * (11 * 32 + 3 * 32) * 4
    for weights, gradients, states, size in (
        ("float32", "float32", "float32", 28),
        ("bfloat16", "bfloat16", "float32", 26),
        ("bfloat16", "float32", "float32", 28),
        ("float32", "float32", "bfloat16", 20),
        ("bfloat16", "bfloat16", "bfloat16", 14),
    ):
        kept = {"weights": weights, "gradients": gradients, "states": states}
        made = floors(model, 100, 8, "bfloat16", **kept)[OPTIMIZER]
        assert made.bytes * 28 == found[OPTIMIZER].bytes * size
    assert floors(model, 100, 8, "bfloat16")[ELEMENTS].bytes == found[ELEMENTS].bytes / 2


@pytest.mark.parametrize(
    "override", ["train.seed=0", "train.segment_tokens=8", "data.packing=documents"]
)
def test_every_part_of_a_step_takes_time(tmp_path: Path, override: str) -> None:
    found = bench_train(tiny_run(tmp_path, override), steps=2, warmup=1)
    assert [part.part for part in found.parts] == list(PARTS)
    assert all(part.milliseconds > 0 for part in found.parts if part.part != IDLE)
    assert all((part.floor > 0) is (part.part != IDLE) for part in found.parts)
    assert found.tokens == 64
    assert found.tokens_per_second == pytest.approx(64_000 / found.milliseconds)
    assert found.peak_measured
    assert found.memory is None
    lines = describe(found)
    assert lines[0].startswith("cpu, float32: ")
    assert len(lines) == 3 + len(PARTS)


def test_the_command_reads_no_data_and_writes_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(RECIPE)
    options = ["--steps", "1", "--warmup", "1", "--json", "--set", "train.checkpointing=full"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = CliRunner().invoke(app, ["bench", "train", str(recipe), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert [part["part"] for part in found["parts"]] == list(PARTS)
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_the_shortest_packed_row_is_timed(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, "data.packing=documents", "data.seq=1", "train.tokens_per_step=1")
    assert bench_train(config, steps=1, warmup=1).tokens == 1


def test_a_tokenised_path_brings_its_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, made = tiny_run(tmp_path).data.path, tmp_path / "made"
    tokenize_corpus(str(corpus), "bpe:270", made)

    def set_up(config: object, objective: Objective, *rest: object) -> None:
        raise InterruptedError(objective.build_model().config.vocab_size)

    monkeypatch.setattr("transnormer.bench.train.set_up", set_up)
    with pytest.raises(InterruptedError, match="270"):
        bench_train(tiny_run(tmp_path, f"data.path={made}"))


def test_no_update_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    def step() -> None:
        nonlocal made
        made += 1

    monkeypatch.setattr(Optimizer, "prepare", lambda self, factor: step)
    strict = ("guard.action=skip", "guard.window=8", "guard.threshold=1e-9", "guard.most=1000")
    # A guard judges from the fifth update on; to profile one is enough.
    bench_train(tiny_run(tmp_path, *strict), steps=1, warmup=12)
    updates = made
    made = 0
    bench_train(tiny_run(tmp_path), steps=1, warmup=12)
    assert updates == made


@pytest.mark.parametrize("axis", ["dp_replicate", "dp_shard", "sp", "tp"])
def test_a_run_of_several_processes_is_refused(tmp_path: Path, axis: str) -> None:
    with pytest.raises(NotImplementedError, match=f"parallel.{axis} is 2; expected 1"):
        bench_train(tiny_run(tmp_path, f"parallel.{axis}=2"))


def test_what_cannot_be_timed_is_refused(tmp_path: Path) -> None:
    masked = tiny_run(tmp_path, "objective.kind=masked", "model.causal=false")
    with pytest.raises(NotImplementedError, match="objective.kind is 'masked'; expected 'causal'"):
        bench_train(masked)
    with pytest.raises(ValueError, match="warmup is 0; expected at least 1"):
        bench_train(tiny_run(tmp_path), warmup=0)
