"""Configuration: strict types, one-line errors, bases and overrides."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, field_validator, model_validator

from transnormer.config import Config, apply_overrides, read_toml, validate


class Round(Config):
    kind: Literal["round"] = "round"
    radius: float = 1.0


class Square(Config):
    kind: Literal["square"] = "square"
    width: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Square":
        if self.width == 13:
            raise ValueError("width is 13; expected a lucky number; take 14")
        return self


class Train(Config):
    steps: int
    rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    quiet: bool = False

    @field_validator("rate")
    @classmethod
    def _check_rate(cls, rate: float) -> float:
        if rate < 0:
            raise ValueError(f"rate is {rate}; expected at least 0")
        return rate


class Run(Config):
    train: Train
    shapes: tuple[Annotated[Round | Square, Field(discriminator="kind")], ...] = ()
    name: str | None = None
    size: float | str | tuple[int, ...] = 1.0


GOOD = {"train": {"steps": 3}}


def test_integers_are_accepted_for_floats() -> None:
    run = validate(Run, {"train": {"steps": 3, "rate": 1}}, source="here")
    assert run.train.rate == 1.0


def test_lists_become_tuples_and_configs_are_hashable() -> None:
    run = Run(train=Train(steps=1, betas=[0.5, 0.6]), shapes=[Round(), {"kind": "square"}])
    assert run.shapes == (Round(), Square())
    assert hash(run) == hash(run.model_copy())


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Run.model_validate(GOOD).train.steps = 4


def test_json_round_trip_is_exact() -> None:
    run = Run(train=Train(steps=1, rate=1e-3), shapes=(Square(width=2),))
    assert Run.model_validate_json(run.model_dump_json()) == run
    assert Run.model_validate(run.model_dump()) == run


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"steps": "x"}}, "train.steps is 'x'; expected an integer (run.toml)"),
        ({"train": {"steps": "10"}}, "train.steps is '10'; expected an integer (run.toml)"),
        ({"train": {"steps": 1.0}}, "train.steps is 1.0; expected an integer (run.toml)"),
        ({"train": {"steps": True}}, "train.steps is True; expected an integer (run.toml)"),
        (
            {"train": {"steps": 1, "quiet": 1}},
            "train.quiet is 1; expected true or false (run.toml)",
        ),
        (
            {"train": {"steps": 1, "rate": -1}},
            "train.rate is -1.0; expected at least 0 (run.toml)",
        ),
        ({"train": {}}, "train.steps is missing; expected a value; set it (run.toml)"),
        ({"train": 3}, "train is 3; expected a table (run.toml)"),
        (
            {"train": {"steps": 1, "stesp": 2}},
            "train.stesp is an unknown key; expected one of betas, quiet, rate, steps; "
            "did you mean steps? (run.toml)",
        ),
        (
            {**GOOD, "zzz": 2},
            "zzz is an unknown key; expected one of name, shapes, size, train; remove it (run.toml)",
        ),
        (
            {**GOOD, "shapes": [{"kind": "squire"}]},
            "shapes[0].kind is 'squire'; expected one of 'round', 'square' (run.toml)",
        ),
        (
            {**GOOD, "shapes": [{}]},
            "shapes[0].kind is missing; expected one of 'round', 'square' (run.toml)",
        ),
        (
            {**GOOD, "shapes": [{"kind": "square", "with": 1}]},
            "shapes[0].with is an unknown key; expected one of kind, width; "
            "did you mean width? (run.toml)",
        ),
        (
            {**GOOD, "shapes": [{"kind": "round"}, {"kind": "square", "width": 13}]},
            "shapes[1].width is 13; expected a lucky number; take 14 (run.toml)",
        ),
        (
            {**GOOD, "shapes": [{"kind": "square", "width": 0}]},
            "shapes[0].width is 0; expected: input should be greater than or equal to 1 (run.toml)",
        ),
        (
            {"train": {"steps": "x", "rate": "y"}},
            "train.steps is 'x'; expected an integer; 1 more (run.toml)",
        ),
        (
            {**GOOD, "size": None},
            "size is None; expected a number or a string or a list (run.toml)",
        ),
        (
            {**GOOD, "size": ["x"]},
            "size is ('x',); expected a number or a string; 1 more (run.toml)",
        ),
    ],
)
def test_mistakes_are_one_line(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        validate(Run, data, source="run.toml")
    assert str(caught.value) == message


class Tables(Config):
    rounds: dict[str, Round]


def test_keys_of_a_dictionary_are_named() -> None:
    with pytest.raises(ValueError, match=r"^rounds.a.b.radius is 'x'; expected a number \(here\)$"):
        validate(Tables, {"rounds": {"a.b": {"radius": "x"}}}, source="here")


def test_base_is_relative_and_the_child_wins(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "root.toml").write_text('name = "root"\n[train]\nsteps = 1\nrate = 0.5\n')
    (tmp_path / "deep" / "mid.toml").write_text('base = "../root.toml"\n[train]\nrate = 0.25\n')
    (tmp_path / "leaf.toml").write_text('base = "deep/mid.toml"\n[train]\nsteps = 7\n')
    assert read_toml(tmp_path / "leaf.toml") == {
        "name": "root",
        "train": {"steps": 7, "rate": 0.25},
    }


def test_a_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('base = "b.toml"\n')
    (tmp_path / "b.toml").write_text('base = "a.toml"\n')
    with pytest.raises(ValueError, match="base is a cycle"):
        read_toml(tmp_path / "a.toml")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.toml is not a file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "child.toml").write_text('base = "gone.toml"\n')
    with pytest.raises(FileNotFoundError, match="the base of .*child.toml"):
        read_toml(tmp_path / "child.toml")
    (tmp_path / "broken.toml").write_text("a = = 1\n")
    with pytest.raises(ValueError, match="broken.toml is not TOML: .*line 1"):
        read_toml(tmp_path / "broken.toml")
    (tmp_path / "odd.toml").write_text("base = 3\n")
    with pytest.raises(ValueError, match="base is 3; expected the path"):
        read_toml(tmp_path / "odd.toml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=10", {"train": {"steps": 10}}),
        ("train.rate=1e-3", {"train": {"steps": 3, "rate": 1e-3}}),
        ("name=tnl-385m", {**GOOD, "name": "tnl-385m"}),
        ("name='10'", {**GOOD, "name": "10"}),
        ("name=/a/*.txt", {**GOOD, "name": "/a/*.txt"}),
        ("name=a=b", {**GOOD, "name": "a=b"}),
        ("name=2024-01-02", {**GOOD, "name": "2024-01-02"}),
        ("name=", {**GOOD, "name": ""}),
        ("name=1\nx=2", {**GOOD, "name": "1\nx=2"}),
        ("new.deep=[1, 2]", {**GOOD, "new": {"deep": [1, 2]}}),
    ],
)
def test_overrides_parse_as_toml_or_bare_words(override: str, expected: dict) -> None:
    assert apply_overrides(GOOD, [override]) == expected
    assert GOOD == {"train": {"steps": 3}}


def test_overrides_index_lists() -> None:
    data = {"shapes": [{"kind": "round"}, {"kind": "square"}]}
    assert apply_overrides(data, ["shapes.1.width=4"])["shapes"][1]["width"] == 4


@pytest.mark.parametrize("override", ["train.steps", "=3", "a..b=1", "train.steps.x=1", "name=[1,"])
def test_bad_overrides_are_named(override: str) -> None:
    with pytest.raises(ValueError, match="override is"):
        apply_overrides(GOOD, [override])
