"""Float8 products on several processes: parameters are gathered as they are, and rounded then."""

from pathlib import Path

import pytest
from parallel_cases import run_in_layout
from ranks import Ranks
from tolerances import FLOAT8_LOSS, RELAID_LOSS
from train_cases import constant_evaluation, tiny_run

from transnormer.parallel.mesh import Axes
from transnormer.train import run_training
from transnormer.train.metrics import METRICS, read_records

PLAIN = ("model.dropout=0.0", "train.steps=3", "data.seq=32", "train.tokens_per_step=128")


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_records(run_dir / METRICS)]


@pytest.mark.parametrize(
    ("recipe", "precision", "axes"),
    [
        pytest.param(
            "tensorwise", "bfloat16", Axes(dp_replicate=2, dp_shard=2), marks=pytest.mark.slow
        ),
        ("rowwise_with_gw_hp", "float32", Axes(dp_shard=2, sp=2)),
    ],
    ids=["tensorwise-hsdp", "rowwise-sp"],
)
def test_ranks_train_as_one_process(
    ranks: Ranks, tmp_path: Path, recipe: str, precision: str, axes: Axes
) -> None:
    given = (*PLAIN, f"train.float8={recipe}", f"train.precision={precision}")
    runs = [
        tiny_run(tmp_path, *given, f"output.dir={tmp_path / name}") for name in ("alone", "many")
    ]
    alone = run_training(runs[0], evaluate=constant_evaluation)
    found = ranks.run(4, run_in_layout, runs[1], axes, False)
    assert found == [(3, True), *[(3, False)] * 3]
    found, exact = losses(tmp_path / "many"), losses(alone.run_dir)
    # Scales of rows are those of one process; a scale of a tensor is that of a rank's own tokens.
    limit = FLOAT8_LOSS if recipe == "tensorwise" else RELAID_LOSS
    for a, b in zip(found, exact, strict=True):
        assert abs(a - b) <= limit * b
