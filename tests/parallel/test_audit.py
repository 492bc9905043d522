"""An audit: right layouts pass, a wrong one is found."""

import json
from pathlib import Path

import pytest
from audit_cases import audit_in_layout
from ranks import Ranks
from train_cases import run_file, some_text, tiny_run

from transnormer.cli.app import run
from transnormer.parallel.mesh import Axes


@pytest.mark.parametrize(
    "axes", [Axes(dp_shard=4), Axes(dp_shard=2, sp=2), Axes(dp_replicate=2, tp=2)]
)
def test_a_right_layout_is_found_right(ranks: Ranks, tmp_path: Path, axes: Axes) -> None:
    found, *others = ranks.run(4, audit_in_layout, tiny_run(tmp_path), axes, False)
    assert others == [found] * 3
    assert found.wrong == []
    assert [x.name for x in found.deviations[:2]] == ["loss", "gradient norm"]
    # Every parameter is compared, and none of them with zeros.
    assert {"embedding.weight", "blocks.0.token_mixer.qkvu_proj.weight"} <= {
        x.name for x in found.deviations
    }
    assert all(x.size > 0 for x in found.deviations)
    assert not (tmp_path / "run").exists()


def test_a_layout_that_drops_a_sum_is_found_wrong(ranks: Ranks, tmp_path: Path) -> None:
    found, *_ = ranks.run(4, audit_in_layout, tiny_run(tmp_path), Axes(dp_shard=2, tp=2), True)
    wrong = {x.name for x in found.wrong}
    assert "gradient norm" in wrong
    # The forward pass is whole.
    assert "loss" not in wrong


@pytest.mark.parametrize(
    ("options", "told"), [((), "--ranks is None"), (("--ranks", "2", "--tolerance", "0"), "--tol")]
)
def test_wrong_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str
) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(run_file(output=tmp_path / "run"))
    assert run(["audit", str(recipe), *options]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_starts_its_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.txt").write_text(some_text())
    recipe = tmp_path / "run.toml"
    recipe.write_text(run_file(corpus=tmp_path / "corpus.txt", output=tmp_path / "run"))
    arguments = ["audit", str(recipe), "--ranks", "2", "--json"]
    assert run(arguments) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["wrong"] == []
    # No order of sums is exact to the last bit: the limit is what decides.
    assert run([*arguments, "--tolerance", "1e-12"]) == 1
    assert "wrong: " in capfd.readouterr().out
