"""Schedules: the shapes of the curves, step by step."""

import pytest

from transnormer.optim import ScheduleConfig, lr_factor


def curve(steps: int, **keys: object) -> list[float]:
    config = ScheduleConfig.model_validate(keys)
    return [lr_factor(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    assert curve(100, schedule=schedule, warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_falls_to_its_final_share() -> None:
    values = curve(21, schedule="cosine", warmup=1, final=0.1)
    assert values[10] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(values, values[1:]))


def test_constant_stays_at_the_peak() -> None:
    assert curve(9, schedule="constant", warmup=2)[2:] == [1.0] * 7


def test_wsd_stays_and_then_falls_linearly() -> None:
    values = curve(20, schedule="wsd", decay=0.25, final=0.0)
    assert values[:15] == [1.0] * 15
    assert values[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_steps_beyond_the_end_keep_the_final_share() -> None:
    config = ScheduleConfig(schedule="cosine", final=0.1)
    assert lr_factor(config, 500, 10) == pytest.approx(0.1)


def test_a_warm_up_longer_than_the_run_is_cut_off() -> None:
    assert curve(2, warmup=4) == [0.25, 0.5]


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="step is -1 of 10"):
        lr_factor(ScheduleConfig(), -1, 10)
