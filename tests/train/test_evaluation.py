"""Signals within an evaluation: it ends there, and nothing of it is recorded."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from train_cases import Found, Notes, constant_evaluation

from transnormer.eval.perplexity import score_texts
from transnormer.train import RunConfig, run_training
from transnormer.train.metrics import read_records

MakeConfig = Callable[..., RunConfig]


class InterruptedAt:
    """An evaluation in parts that sends a signal within its number `at`, and counts its parts."""

    def __init__(self, at: int, number: int = signal.SIGINT) -> None:
        self.at, self.number, self.calls, self.parts = at, number, 0, 0

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Found:
        for part in range(10):
            if part == 3 and self.calls == self.at:
                os.kill(os.getpid(), self.number)
            self.parts += 1
            if progress is not None:
                progress(1)
        self.calls += 1
        return constant_evaluation(model, tokenizer, texts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("at", "step"), [(0, 0), (1, 2), (3, 6)])
def test_a_signal_ends_an_evaluation_at_once(
    make_config: MakeConfig, at: int, step: int, number: int
) -> None:
    config = make_config("train.eval_every=2")
    result = run_training(config, evaluate=(evaluate := InterruptedAt(at, number)))
    assert (result.step, result.stopped_by) == (step, signal.Signals(number).name)
    assert evaluate.parts == 10 * at + 4
    assert result.checkpoint.name == f"step_{step:08d}"
    rows = read_records(result.run_dir / "evaluations.jsonl")
    assert [row["step"] for row in rows] == list(range(0, step, 2))
    resumed = run_training(config, resume=True, evaluate=constant_evaluation)
    assert (resumed.step, resumed.stopped_by) == (6, "steps")
    rows = read_records(result.run_dir / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_to_a_resumed_run(
    make_config: MakeConfig,
) -> None:
    class AtTheEnd(Notes):
        def step(self, report: Any, steps: int) -> None:
            super().step(report, steps)
            if report.step == steps:
                os.kill(os.getpid(), signal.SIGINT)

    result = run_training(make_config(), evaluate=constant_evaluation, progress=AtTheEnd())
    assert (result.step, result.stopped_by) == (6, "SIGINT")
    resumed = run_training(make_config(), resume=True, evaluate=constant_evaluation)
    assert resumed.last is not None
    assert resumed.last.step == 6


def test_the_scores_of_texts_can_be_ended(make_config: MakeConfig) -> None:
    def evaluate(*arguments: Any, progress: Callable[[int], None] | None = None) -> Any:
        def check(tokens: int) -> None:
            seen.append(tokens)
            os.kill(os.getpid(), signal.SIGINT)
            assert progress is not None
            progress(tokens)

        seen: list[int] = []
        try:
            return score_texts(*arguments, progress=check)
        finally:
            assert len(seen) == 1

    result = run_training(make_config(), evaluate=evaluate)
    assert (result.step, result.stopped_by) == (0, "SIGINT")
    assert result.first is None
