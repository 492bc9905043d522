"""Objectives on several processes: what one process learns, keeps and measures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from audit_cases import audit_in_layout
from objective_cases import first_scores, run_in_float64, run_of
from parallel_cases import name_of
from ranks import Ranks
from safetensors.torch import load_file
from tolerances import LAYOUT_FLOAT64, ROUNDED_EVALUATION, assert_close

from transnormer.parallel.mesh import Axes
from transnormer.train.metrics import read_records

# The first layout of a run; sequences are cut where an objective lets them be.
FIRST = {
    "masked": Axes(dp_shard=2, sp=2),
    "classification": Axes(dp_shard=4),
    "instruction": Axes(dp_shard=2, sp=2),
    "lora": Axes(dp_shard=2, sp=2),
}
LAST = dict.fromkeys(FIRST, Axes(dp_replicate=2, tp=2)) | {"lora": Axes(2, 2)}
# Frozen layers behind segments that go on: gradients pass between them all the same.
SEGMENTS = {"lora": ("train.segment_tokens=32",)}
TIMES = {"seconds", "tokens_per_second"}


def records(run_dir: Path, name: str) -> tuple[list[str], torch.Tensor]:
    """The keys and the numbers of a file of records, float64 [rows, keys], times left out."""
    rows = [
        {k: v for k, v in row.items() if k not in TIMES} for row in read_records(run_dir / name)
    ]
    return list(rows[0]), torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)


def assert_same_run(found: Path, exact: Path) -> None:
    """Losses, norms, scores and the last checkpoint of two runs in float64 are the same."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (keys, numbers), (others, expected) = records(found, name), records(exact, name)
        assert keys == others
        for key, x, y in zip(keys, numbers.T, expected.T, strict=True):
            assert_close(x, y, limit=LAYOUT_FLOAT64, name=key)
    steps = [sorted((run / "checkpoints").iterdir())[-1] for run in (found, exact)]
    files: list[Any] = [
        sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file()) for step in steps
    ]
    assert files[0] == files[1]
    for file in files[0]:
        if file.stem in ("model", "optimizer", "adapter_model"):
            ours, exactly = (load_file(step / file) for step in steps)
            assert list(ours) == list(exactly)
            for name, x in exactly.items():
                assert_close(ours[name], x, limit=LAYOUT_FLOAT64, name=f"{file} {name}")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) if kind == "lora" else kind for kind in FIRST],
)
def test_a_run_moves_between_ranks_and_one_process(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    run_in_float64(None, run_of(tmp_path, kind, "alone"), Axes(), False)
    for axes, steps in ((FIRST[kind], 2), (None, 4), (LAST[kind], 6)):
        config = run_of(tmp_path, kind, "many", f"train.steps={steps}", *SEGMENTS.get(kind, ()))
        if axes is None:
            assert run_in_float64(None, config, Axes(), True) == steps
        else:
            assert ranks.run(4, run_in_float64, config, axes, steps > 2) == [steps] * 4
    assert_same_run(tmp_path / "many", tmp_path / "alone")


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("masked", Axes(dp_replicate=2, dp_shard=2)),
        ("masked", Axes(sp=2, tp=2)),
        ("classification", Axes(dp_shard=2, tp=2)),
        ("instruction", Axes(dp_shard=2, tp=2)),
        ("lora", Axes(dp_replicate=2, dp_shard=2)),
    ],
    ids=name_of,
)
def test_every_objective_can_be_audited(
    ranks: Ranks, tmp_path: Path, kind: str, axes: Axes
) -> None:
    packing = ("data.packing=documents",) if kind == "masked" else ()
    config = run_of(tmp_path, kind, "run", "model.dropout=0.1", *packing)
    found, *others = ranks.run(4, audit_in_layout, config, axes, False)
    assert others == [found] * 3
    assert found.wrong == []
    assert all(x.size > 0 for x in found.deviations)


@pytest.mark.parametrize("kind", ["causal", "masked", "classification", "lora"])
def test_a_run_in_bfloat16_is_evaluated_on_ranks(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    given = ("train.precision=bfloat16", "train.steps=1")
    exact = first_scores(None, run_of(tmp_path, kind, "alone", *given))
    found = ranks.run(4, first_scores, run_of(tmp_path, kind, "many", *given))
    assert found == [found[0]] * 4
    assert found[0] == pytest.approx(exact, rel=ROUNDED_EVALUATION)
