"""The labelled dirty slice: every limit of docs/cleaning.md, with the measures of the benchmark."""

import sys
from pathlib import Path
from typing import Any

import pytest
from clean_cases import run_clean

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def judged(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of both halves."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import clean as benchmark
    finally:
        sys.path.remove(str(BENCHMARKS))
    data, output = shared_dir / "data", tmp_path_factory.mktemp("slice") / "out"
    run_clean(data / benchmark.DOCUMENTS, output)
    found = benchmark.Slice(data, output)
    return {part: benchmark.judge(found, part) for part in benchmark.HALVES}


@pytest.mark.parametrize("part", ["tuned", "held"])
@pytest.mark.parametrize(
    ("figure", "least"),
    [
        ("recall", 0.95),
        ("median_f1", 0.98),
        ("preserved", 1.0),
        ("pii_recall", 0.97),
        ("pii_precision", 0.95),
        ("exact_recall", 1.0),
        ("near_recall_0.8", 0.95),
        ("near_recall_0.7", 0.95),
    ],
)
def test_what_must_be_found_is(
    part: str, figure: str, least: float, judged: dict[str, Any]
) -> None:
    assert judged[part][figure] >= least


@pytest.mark.parametrize("part", ["tuned", "held"])
@pytest.mark.parametrize(("figure", "most"), [("clean_dropped", 0.01), ("false_merges", 0)])
def test_what_must_not_be_dropped_is_not(
    part: str, figure: str, most: float, judged: dict[str, Any]
) -> None:
    assert judged[part][figure] <= most
