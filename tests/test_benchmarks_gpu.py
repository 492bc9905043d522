"""The GPU benchmarks without a GPU: rows, bytes, options, dry runs, and a grid that finds faults."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import oracles
import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from transnormer.ops import linear_attention

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = ("packed", "flatness", "decode", "host", "lightning1", "gated")


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the benchmarks' folder, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__(name)


def run_dry(name: str, output: Path, *arguments: str) -> dict[str, Any]:
    """A dry run; the last line of its output and what it wrote."""
    command = [sys.executable, str(BENCHMARKS / name), "--device", "cpu", *arguments]
    command += ["--output", str(output), "--commit", "abc"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    last = json.loads(run.stdout.splitlines()[-1])
    result = json.loads(output.read_text(encoding="utf-8"))
    assert last["failures"] == result["failures"] == []
    assert "dry_run" in result
    assert {"device", "torch", "triton", "peers", "commit"} <= set(result["environment"])
    return result


def test_bytes_of_a_row_are_those_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = module("op_gpu_rows", monkeypatch)
    row = rows.Row(4, 32, 1024, 128)
    assert row.forward_bytes == 4 * 4 * 32 * 1024 * 128 * 2
    assert row.backward_bytes == 7 * 4 * 32 * 1024 * 128 * 2
    # The tables that the targets come from count 128 MiB of outputs and gradients here.
    assert row.output_bytes == 128 << 20
    assert row._replace(dtype="fp32").tensor_bytes == 2 * row.tensor_bytes


def test_rows_are_chosen_by_name_and_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = module("op_gpu_rows", monkeypatch)
    chosen = rows.select(["host", "quick", "2x32x8192x64"])
    assert chosen == ["4x32x8192x128", "4x32x2048x128", "2x32x8192x64", "decode", "host"]
    assert set(rows.select(["all"])) > {*rows.GROUPS["attention"], *rows.PARTS}
    with pytest.raises(ValueError, match="row is '4x4'; expected one of attention"):
        rows.select(["4x4"])


def test_packed_documents_are_uneven_and_fill_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = module("op_gpu_rows", monkeypatch).packed_bounds(65_536)
    lengths = [b - a for a, b in zip(bounds, bounds[1:])]
    assert len(lengths) == 32
    assert bounds[0] == 0
    assert bounds[-1] == 65_536
    assert max(lengths) > 4 * min(lengths) > 0
    assert all(bound % 64 for bound in bounds[1:-1])


def test_every_promise_of_a_row_gets_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = module("op_gpu_rows", monkeypatch)
    attention = module("op_gpu_attention", monkeypatch)
    row = rows.Row(1, 1, 64, 16, rows.Target("best", 0.5, 0.5, forward_last_layer=0.6))
    times = {"forward_ms": 1.0, "backward_ms": 3.0, "peak_extra_mib": 4 * row.tensor_bytes / 2**20}
    ours = {"first_layer": times, "last_layer": times}
    peers = {
        "a": {"forward_ms": 4.0, "backward_ms": 5.0},
        "b": {"forward_ms": 2.0, "backward_ms": 9.0},
        "c": {"error": "ImportError: no"},
    }
    ratio = attention.ratios(ours, peers)
    assert ratio["first_layer"]["forward"] == {"a": 0.25, "b": 0.5, "best": 0.5, "best_peer": "b"}
    verdicts = attention.verdicts(row, ours, ratio)
    assert {name: v["met"] for name, v in verdicts.items()} == {
        "forward of best": True,
        "backward of best": False,
        "forward of best, last layer": True,
        "backward of best, last layer": True,
        "peak extra memory of outputs and gradients": True,
    }
    assert attention.verdicts(row, ours, attention.ratios(ours, {})).keys() == {
        "peak extra memory of outputs and gradients"
    }


def test_compilation_jobs_cover_each_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    op_gpu = module("op_gpu", monkeypatch)
    jobs = op_gpu.warm_jobs(list(op_gpu.ATTENTION_ROWS), op_gpu.DEFAULT_PEERS)
    chunk = [shapes for name, shapes in jobs if name == "fla_chunk"]
    assert sorted(chunk) == [
        ["1x16x1024x128"],
        ["1x8x1024x128"],
        ["2x32x1024x64"],
        ["4x16x1024x256"],
        ["4x32x1024x128"],
    ]
    exact = [shape for name, shapes in jobs if name == "opennlplab" for shape in shapes]
    assert sorted(exact) == sorted(row.name for row in op_gpu.ATTENTION_ROWS)
    assert not [name for name, _ in jobs if name.startswith("softmax")]


def test_float64_truth_is_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = module("exact", monkeypatch)
    bounds = [0, 1, 1, 40, 70]
    q, k, v = (torch.randn(1, 70, 3, dim).double() for dim in (8, 8, 12))
    log_decay = torch.tensor([0.0, -0.3, float("-inf")]).double()
    state = torch.randn(4, 3, 8, 12).double()
    actual = exact.exact_attention(q, k, v, log_decay, state, bounds)
    wanted = oracles.linear_attention(
        q, k, v, log_decay, initial_state=state, cu_seqlens=torch.tensor(bounds)
    )
    for x, y in zip(actual, wanted, strict=True):
        assert_close(x, y, name="exact")


def _run_toy(case: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    correctness = module("correctness", monkeypatch)
    subject = module("subjects", monkeypatch).Subject("toy", lambda: call)
    return list(correctness.judge(subject, call, correctness.Case(*case), "cpu"))


def _right(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, **options: Any) -> Any:
    return linear_attention(
        q,
        k,
        v,
        log_decay,
        initial_state=options["initial_state"],
        cu_seqlens=options["cu_seqlens"],
    )


def _without_its_tail(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options: Any) -> Any:
    """Drops what lies behind the last whole chunk of 64."""
    o, state = _right(q, k, v, log_decay, **options)
    whole = q.shape[1] // 64 * 64
    return torch.cat([o[:, :whole], 0 * o[:, whole:]], 1), state


def _slow_heads_only(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options: Any) -> Any:
    """Wrong only where a head decays strongly: the state becomes NaN, as inf times zero does."""
    o, state = _right(q, k, v, log_decay, **options)
    broken = (log_decay < -5).view(1, -1, 1, 1)
    return o, torch.where(broken, torch.full_like(state, float("nan")), state)


def test_grid_passes_a_right_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    correctness = module("correctness", monkeypatch)
    entries = _run_toy((100, 16, 24, "bf16", True), _right, monkeypatch)
    assert [entry["result"] for entry in entries] == list(correctness.RESULTS)
    for counts in correctness.tallies(entries).values():
        assert counts["bf16"].checks == len(correctness.SLOPES)
        assert counts["bf16"].wrong == counts["bf16"].imprecise == 0


def test_grid_finds_a_lost_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    correctness = module("correctness", monkeypatch)
    entries = _run_toy((129, 16, 16, "fp32"), _without_its_tail, monkeypatch)
    counts = correctness.tallies(entries)
    assert counts["o"]["fp32"].wrong == len(correctness.SLOPES)
    assert "seq 129, 16x16, fp32" in counts["o"]["fp32"].example
    assert counts["final_state"]["fp32"].wrong == 0


def test_grid_finds_nan_and_names_its_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    correctness = module("correctness", monkeypatch)
    entries = _run_toy((65, 16, 16, "fp32"), _slow_heads_only, monkeypatch)
    counts = correctness.tallies(entries)["final_state"]["fp32"]
    assert counts.wrong_slopes == [7.75, 30.0, float("inf")]
    assert counts.worst == float("inf")
    assert counts.example.endswith("slope 7.75")
    table = correctness.markdown({"toy": entries}, {"toy": "1"})
    row = next(line for line in table.splitlines() if line.startswith("| toy | final_state"))
    assert "NaN or infinite" in row
    assert "7.75, 30, inf" in row


def test_grid_tells_a_refusal_from_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise NotImplementedError("takes no packed sequences")

    def raises(*_: Any, **__: Any) -> None:
        raise AssertionError

    correctness = module("correctness", monkeypatch)
    found = {
        call.__name__: _run_toy((64, 16, 16, "fp32"), call, monkeypatch)
        for call in (refuses, raises)
    }
    assert found["refuses"][0]["refused"] == "NotImplementedError: takes no packed sequences"
    assert found["raises"][0]["raised"].startswith("AssertionError")
    offered, errors = correctness.markdown(found, {}).split("## Raised an error")
    assert "- refuses: 1 x NotImplementedError" in offered
    assert "- raises: 1 x AssertionError" in errors


def test_shares_of_the_grid_cover_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    correctness = module("correctness", monkeypatch)
    grid = correctness.grid()
    parts = [case for i in range(4) for case in correctness.shard(grid, i, 4)]
    assert sorted(parts) == sorted(grid)
    assert {case.seq for case in grid} >= set(correctness.LENGTHS)
    assert len(set(grid)) == len(grid)


@pytest.mark.slow
def test_dry_run_of_op_gpu_takes_every_path(tmp_path: Path) -> None:
    names = ["4x32x8192x128", "4x32x2048x128-fp32", *PARTS]
    peers = ["softmax_any", "fla_chunk"]
    result = run_dry("op_gpu.py", tmp_path / "op.json", "--rows", *names, "--peers", *peers)
    first, second = result["rows"]
    assert first["peers"]["softmax_any"]["forward_ms"] > 0
    # Its kernels need a GPU; whatever it says, the run goes on.
    assert "error" in first["peers"]["fla_chunk"]
    assert second["peers"] == {}
    assert first["ours"]["last_layer"]["within"]
    assert result["limits"]["copy_gb_per_s"] > 0
    assert [row["batch"] for row in result["decode"]["rows"]] == [1, 2]
    assert set(PARTS) <= set(result)
    picture = tmp_path / "op.png"
    command = [sys.executable, str(BENCHMARKS / "plot_op_gpu.py"), "--result"]
    command += [str(tmp_path / "op.json"), "--output", str(picture), "--shape", "2", "2", "32"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["lines"] == 2
    assert picture.stat().st_size > 10_000


def test_an_interrupted_run_of_op_gpu_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    op_gpu, output = module("op_gpu", monkeypatch), tmp_path / "op.json"
    names = [row.name for row in op_gpu.ATTENTION_ROWS[:2]]
    done: list[str] = []

    def run_row(row: Any, *others: Any) -> dict[str, Any]:
        done.append(row.name)
        if len(done) > 2:
            raise KeyboardInterrupt
        if len(done) == 2:
            # It is on the disk by now, should the process be killed, and says so.
            kept = json.loads(output.with_suffix(".unfinished.json").read_text())
            assert [row["row"] for row in kept["rows"]] == names[:1]
            assert kept["failures"][-1] == "not finished"
            assert not output.exists()
            raise KeyboardInterrupt
        return {"error": "none was made", "peers": {}, "seconds": 0.0}

    monkeypatch.setattr(op_gpu, "run_row", run_row)
    arguments = ["--device", "cpu", "--peers", "ours", "--output", str(output), "--rows", *names]
    monkeypatch.setattr(sys, "argv", ["op_gpu.py", *arguments])
    assert op_gpu.main() == 1
    result = json.loads(output.read_text())
    assert [row["row"] for row in result["rows"]] == names[:1]
    assert result["failures"][-1] == "the run ended early: KeyboardInterrupt: "
    # One that measures nothing leaves that as it is.
    assert op_gpu.main() == 1
    assert json.loads(output.read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["op.json"]


def test_runs_of_different_rows_become_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    op_gpu = module("op_gpu", monkeypatch)
    verdict = {"value": 0.4, "at_most": 0.5, "met": True}
    common = {"environment": {"device": "a"}, "limits": {}, "failures": ["x"], "wall_s": 1.0}
    first = common | {"rows": [{"row": "4x32x1024x128", "old": True}], "host": {"us": 1}}
    second = common | {
        "rows": [{"row": "4x32x1024x128", "targets": {"forward": verdict}}],
        "packed": {"ratio": 1},
    }
    third = common | {"rows": [{"row": "4x32x8192x128"}]}
    merged = op_gpu.merge([first, second, third])
    assert [(row["row"], row["run"]) for row in merged["rows"]] == [
        ("4x32x8192x128", 2),
        ("4x32x1024x128", 1),
    ]
    assert "old" not in merged["rows"][1]
    assert merged["host"]["run"] == 0
    assert merged["packed"]["run"] == 1
    assert merged["summary"] == {"4x32x1024x128 forward": verdict}
    assert (len(merged["runs"]), merged["wall_s"]) == (3, 3.0)


@pytest.mark.slow
def test_dry_run_of_the_correctness_grid(tmp_path: Path) -> None:
    output = tmp_path / "grid.json"
    result = run_dry("peers_correctness.py", output, "--subjects", "ours", "--shards", "1")
    assert result["summary"]["ours"]["dinitial_state"]["fp32"]["wrong"] == 0
    assert "| ours | o | bf16 |" in output.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_dry_run_of_decode_gpu(tmp_path: Path) -> None:
    options = [
        "--models",
        "tnl-7b",
        "--batches",
        "1",
        "256",
        "--modes",
        "ring",
        "prefill",
        "--steps",
    ]
    result = run_dry("decode_gpu.py", tmp_path / "decode.json", *options, "2")
    rows = result["models"]["tnl-7b"]["decode"]
    assert [row["context"] for row in rows] == [1024, 131_072] * 2
    assert [row["batch"] for row in rows] == [256, 256, 1, 1]
    assert all(row["share_of_limit"] > 0 for row in rows)
    assert all(("beside" in row) == (row["context"] == 131_072) for row in rows)
    assert result["check"]["right"]
    names = {"batch 256 ring", "batch 256 ring contexts", "prefill", "ragged"}
    assert {f"tnl-7b {name}" for name in names} <= set(result["verdicts"])


def test_decode_gpu_begins_nothing_when_its_seconds_are_spent(tmp_path: Path) -> None:
    options = ["--models", "tnl-385m", "--batches", "1", "--modes", "fused", "prefill"]
    result = run_dry("decode_gpu.py", tmp_path / "decode.json", *options, "--budget", "0")
    assert result["models"] == {}
    assert result["left_out"] == ["tnl-385m fused 1", "tnl-385m prefill 0"]


def test_a_failure_of_ours_ends_with_an_exit_code(tmp_path: Path) -> None:
    output = tmp_path / "op.json"
    command = [sys.executable, str(BENCHMARKS / "op_gpu.py"), "--device", "cpu"]
    command += ["--rows", "4x32x1024x128", "host", "--peers", "softmax_any"]
    command += ["--implementation", "no-such", "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    result = json.loads(output.read_text(encoding="utf-8"))
    assert len(result["failures"]) == 2
    assert "no-such" in result["failures"][0]
    assert result["rows"][0]["peers"]["softmax_any"]["backward_ms"] > 0


@pytest.mark.slow
def test_dry_run_of_float8_gpu(tmp_path: Path) -> None:
    options = ("--arms", "bfloat16", "tensorwise", "--steps", "2")
    result = run_dry("float8_gpu.py", tmp_path / "float8.json", *options)
    losses = [result["rows"][arm]["losses"] for arm in ("bfloat16", "tensorwise")]
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[0] != losses[1]
    assert result["less_bfloat16"]["tensorwise"]["largest"] > 0
