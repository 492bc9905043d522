"""`train.float8` in a run: what it writes, how it goes on, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerances import FLOAT8_LOSS
from train_cases import assert_same_checkpoint

from transnormer.models import checkpoint
from transnormer.train import RunConfig, run_training
from transnormer.train.metrics import METRICS, read_records

MakeConfig = Callable[..., RunConfig]
FLOAT8 = "train.float8=rowwise"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_records(run / METRICS)]


def test_a_run_goes_on_without_float8_and_back(make_config: MakeConfig, tmp_path: Path) -> None:
    mixed, whole = (
        ("optimizer.schedule=constant", f"output.dir={tmp_path / name}")
        for name in ("mixed", "whole")
    )
    for steps, float8 in ((2, "rowwise"), (4, "none"), (6, "tensorwise")):
        config = make_config(*mixed, f"train.steps={steps}", f"train.float8={float8}")
        done = run_training(config, resume=steps > 2)
    plain = run_training(make_config(*whole))
    found, exact = losses(done.run_dir), losses(plain.run_dir)
    assert len(found) == 6
    assert all(0 < abs(a - b) <= FLOAT8_LOSS * b for a, b in zip(found, exact, strict=True))
    names = [
        {p.relative_to(run.checkpoint).as_posix() for p in run.checkpoint.rglob("*")}
        for run in (done, plain)
    ]
    assert names[0] == names[1]
    for name in (n for n in names[0] if n.endswith(".safetensors")):
        a, b = load_file(done.checkpoint / name), load_file(plain.checkpoint / name)
        assert {k: (x.shape, x.dtype) for k, x in a.items()} == {
            k: (x.shape, x.dtype) for k, x in b.items()
        }
    assert type(checkpoint.load(done.run_dir).blocks[0].token_mixer.out_proj) is torch.nn.Linear


def test_a_stopped_run_goes_on_bit_for_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    constant = (FLOAT8, "optimizer.schedule=constant")
    run_training(make_config(*constant, "train.steps=3"))
    parts = run_training(make_config(*constant), resume=True)
    whole = run_training(make_config(*constant, f"output.dir={tmp_path / 'whole'}"))
    assert losses(parts.run_dir) == losses(whole.run_dir)
    assert_same_checkpoint(parts.checkpoint, whole.checkpoint)


def test_weights_in_bfloat16_train_with_float8_products(make_config: MakeConfig) -> None:
    half = ("train.weights=bfloat16", "train.precision=bfloat16", "optimizer.states=bfloat16")
    done = run_training(make_config(FLOAT8, *half, "train.residual=bfloat16"))
    assert losses(done.run_dir)[-1] < losses(done.run_dir)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.seq=8"],
            "data.seq is 8 beside train.float8 = 'rowwise'; expected a multiple of 16",
        ),
        (["parallel.sp=2"], "data.seq is 16 .*; expected a multiple of 32"),
        (
            ["train.segment_tokens=8"],
            "train.segment_tokens is 8 beside train.float8 = 'rowwise'; expected a multiple of 16",
        ),
        (
            ["objective={kind='classification'}", "data.path=x.jsonl"],
            "train.float8 is 'rowwise'; expected 'none' for objective.kind = 'classification'",
        ),
    ],
)
def test_what_float8_cannot_multiply_is_refused(
    make_config: MakeConfig, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_config(FLOAT8, *overrides)
    assert "\n" not in str(caught.value)


def test_parts_of_projections_on_several_ranks_are_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(NotImplementedError, match="train.float8 is 'rowwise'.* set parallel.tp to"):
        run_training(make_config(FLOAT8, "parallel.tp=2"))
