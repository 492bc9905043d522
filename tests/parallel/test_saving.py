"""Checkpoints that many ranks write at once, beside the training."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from decoder_cases import tnl_config
from ranks import Ranks
from safetensors.torch import load_file
from saving_cases import (
    run_with_a_full_disk,
    staged_while_it_trains,
    whole_tensors,
    write_and_read,
    write_broken,
)
from train_cases import tiny_run

from transnormer.models import checkpoint, tensor_files
from transnormer.parallel.save_shares import save_shares
from transnormer.parallel.shares import Share
from transnormer.train.checkpoints import list_checkpoints


def test_shares_of_any_layout_make_the_files_of_whole_tensors(ranks: Ranks, tmp_path: Path) -> None:
    many, one = tmp_path / "many", tmp_path / "one"
    many.mkdir()
    one.mkdir()
    assert ranks.run(4, write_and_read, many) == [[]] * 4
    tensor_files.write_tensors(whole_tensors(), one)
    found, expected = (load_file(path / "model.safetensors") for path in (many, one))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x)


@pytest.mark.parametrize(
    ("why", "kind"),
    [(OSError(28, "No space left on device"), "OSError"), (KeyError("a name"), "RuntimeError")],
)
def test_what_happens_to_one_rank_is_an_error_of_all(
    ranks: Ranks, tmp_path: Path, why: Exception, kind: str
) -> None:
    # A disk's error alone ends a run as one: with the advice to make room.
    for name, text in ranks.run(4, write_broken, tmp_path, why):
        assert name == kind
        assert "rank 2: " in text
        assert str(why.args[-1]) in text


def test_a_dtype_that_files_do_not_hold_is_named(tmp_path: Path) -> None:
    share, alone = Share(torch.Size([2]), torch.complex64, []), dist.group.WORLD
    with pytest.raises(TypeError, match=r"^phases is torch\.complex64; expected float64, "):
        save_shares({"phases": share}, tmp_path, "model", alone)
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_what_was_staged(ranks: Ranks, tmp_path: Path) -> None:
    before, *_ = ranks.run(4, staged_while_it_trains, tnl_config(vocab_size=61), tmp_path)
    found = checkpoint.load(tmp_path).state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], expected) for name, expected in before.items())


@pytest.mark.parametrize("beside", ["true", "false"])
def test_a_full_disk_of_any_rank_ends_the_run_with_its_last_checkpoint(
    ranks: Ranks, tmp_path: Path, beside: str
) -> None:
    config = tiny_run(tmp_path, "train.save_every=2", f"train.save_async={beside}")
    told = ranks.run(4, run_with_a_full_disk, config, 3)
    assert all("checkpoint of step 2 cannot be written: rank 3" in text for text in told)
    assert list_checkpoints(tmp_path / "run") == []
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial-*"))
