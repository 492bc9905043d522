"""Saving and loading models: exact, whole or absent, and every damage is one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoder_cases import make_ids, make_model, tnl_config, variant_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from transnormer import files
from transnormer.data import ByteTokenizer
from transnormer.models import checkpoint, tensor_files
from transnormer.models.assembly import assemble
from transnormer.models.decoder import Decoder
from transnormer.models.tensor_files import StoredTensor
from transnormer.nn.rotary import Rotary


def same_tensors(a: Decoder, b: Decoder) -> bool:
    """Whether two models hold equal tensors of equal dtypes."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small model, saved."""
    checkpoint.save(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "config",
    [
        tnl_config(),
        tnl_config(tie_embeddings=False),
        variant_config({"gate": "low_rank", "bias": True}, lrpe="all"),
    ],
    ids=["tied", "untied", "variant"],
)
def test_what_is_saved_is_loaded_exactly(tmp_path: Path, config: object) -> None:
    model = make_model(config)
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == model.config
    assert same_tensors(loaded, model)
    assert loaded.fingerprint() == model.fingerprint()
    ids = make_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_loaded_model_is_in_eval_mode_and_trains(saved: Path) -> None:
    model = checkpoint.load(saved)
    assert not model.training
    model.loss(make_ids(1, 5), make_ids(1, 5)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bfloat16_keeps_theta_and_decays_precise(saved: Path) -> None:
    model, exact = checkpoint.load(saved, dtype=torch.bfloat16), checkpoint.load(saved)
    assert model.embedding.weight.dtype == torch.bfloat16
    mixer, exact_mixer = model.blocks[0].token_mixer, exact.blocks[0].token_mixer
    assert mixer.lrpe.theta.dtype == torch.float32
    assert torch.equal(mixer.lrpe.theta, exact_mixer.lrpe.theta)
    assert torch.equal(mixer.decay.log_decay, exact_mixer.decay.log_decay)


def test_the_stored_dtype_is_kept(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        checkpoint.save(make_model(dtype=dtype), tmp_path / "model")
        loaded = checkpoint.load(tmp_path / "model")
        assert loaded.embedding.weight.dtype == dtype
        assert loaded.blocks[0].token_mixer.lrpe.theta.dtype.itemsize >= 4


def test_stored_buffers_are_kept_beside_computed_ones(tmp_path: Path) -> None:
    """A module that is reset for its frequencies keeps the reflection that was stored."""
    exact = nn.Sequential(nn.Linear(2, 2), Rotary(8, reflect=True))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Rotary(8, reflect=True))
    stored = {
        name: StoredTensor(x, tmp_path / "model.safetensors")
        for name, x in exact.state_dict().items()
    }
    assemble(model, stored, tmp_path, str, device=None, dtype=torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].reflection.dtype == torch.float64
    assert torch.equal(model[1].reflection, exact[1].reflection)
    assert torch.equal(model[1].theta, exact[1].theta)


def test_shards_hold_the_same_model(saved: Path) -> None:
    tensors = load_file(saved / tensor_files.SINGLE)
    (saved / tensor_files.SINGLE).unlink()
    files = tensor_files.write_tensors(tensors, saved, shard_bytes=20_000)
    assert len(files) > 2
    assert (saved / tensor_files.SHARD_INDEX).is_file()
    found = tensor_files.read_tensors(saved)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].tensor, tensors[name]) for name in tensors)


def test_tensors_beyond_a_shard_are_cut_into_rows_and_joined(tmp_path: Path) -> None:
    model = make_model()
    checkpoint.write_weights(model, tmp_path, shard_bytes=3_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert max(sum(x.nbytes for x in load_file(shard).values()) for shard in shards) <= 3_000
    assert same_tensors(checkpoint.load(tmp_path), model)
    index = tmp_path / tensor_files.SHARD_INDEX
    table = files.read_json(index)
    lost = "embedding.weight[23:46]"
    name = table["weight_map"].pop(lost)
    kept = load_file(tmp_path / name)
    kept.pop(lost)
    save_file(kept, tmp_path / name, metadata={"format": "pt"})
    files.write_json(table, index)
    with pytest.raises(ValueError, match=r"rows 46 to 61 of embedding.weight behind row 23"):
        tensor_files.read_tensors(tmp_path)


def test_saving_replaces_a_saved_model(saved: Path) -> None:
    other = make_model(tnl_config(vocab_size=7))
    checkpoint.save(other, saved)
    assert same_tensors(checkpoint.load(saved), other)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["model"]


def test_saving_does_not_replace_what_is_no_saved_model(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds thesis\.txt; expected a saved model"):
        checkpoint.save(make_model(), tmp_path)
    with pytest.raises(ValueError, match=r"is a file; expected a directory"):
        checkpoint.save(make_model(), tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_a_write_that_fails_leaves_the_old_model(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", refuse)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(make_model(tnl_config(vocab_size=7)), saved)
    assert same_tensors(checkpoint.load(saved), make_model())
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def step_directory(run: Path, step: int, saved: Path, *, complete: bool) -> Path:
    """A step of a run, made of a saved model."""
    step_dir = run / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(saved, step_dir)
    if complete:
        facts = {"sha256": files.sha256(step_dir / checkpoint.CONFIG)}
        marker = {"files": {checkpoint.CONFIG: facts}}
        (step_dir / checkpoint.COMPLETE).write_text(json.dumps(marker))
    return step_dir


def test_a_run_gives_its_newest_complete_step(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, complete in ((900, True), (10_000, True), (20_000, False)):
        step_directory(run, step, saved, complete=complete)
    assert checkpoint.newest_complete_step(run) == run / "checkpoints" / "step_00010000"
    assert checkpoint.find_model(run) == run / "checkpoints" / "step_00010000"
    assert same_tensors(checkpoint.load(run), make_model())


def test_an_incomplete_step_is_refused(saved: Path, tmp_path: Path) -> None:
    step = step_directory(tmp_path / "run", 5, saved, complete=False)
    with pytest.raises(ValueError, match="lacks COMPLETE"):
        checkpoint.load(step)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / "run")


def test_a_changed_configuration_of_a_step_is_refused(saved: Path, tmp_path: Path) -> None:
    step = step_directory(tmp_path / "run", 5, saved, complete=True)
    text = (step / checkpoint.CONFIG).read_text()
    (step / checkpoint.CONFIG).write_text(text.replace('"heads": 2', '"heads": 4'))
    with pytest.raises(ValueError, match=r"config\.json has another SHA-256 than COMPLETE says"):
        checkpoint.load(step)


def test_the_tokenizer_beside_the_weights_is_found(saved: Path) -> None:
    assert checkpoint.find_tokenizer(saved) is None
    ByteTokenizer().save(saved)
    assert checkpoint.find_tokenizer(saved) == saved / "byte_tokenizer.json"
    checkpoint.save(make_model(), saved)


def test_the_fingerprint_of_the_tokenizer_is_kept(tmp_path: Path) -> None:
    checkpoint.write_weights(make_model(), tmp_path, tokenizer_fingerprint="abc")
    assert checkpoint.tokenizer_fingerprint(tmp_path) == "abc"
    assert same_tensors(checkpoint.load(tmp_path), make_model())


def edit_config(directory: Path, change: Callable[[dict], object]) -> None:
    """Change the contents of config.json."""
    data = json.loads((directory / "config.json").read_text())
    change(data)
    (directory / "config.json").write_text(json.dumps(data))


def edit_weights(directory: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors, with hashes that say all is well."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    digest = files.sha256(directory / "model.safetensors")
    edit_config(directory, lambda data: data.update(weights={"model.safetensors": digest}))


def flip_last_byte(directory: Path) -> None:
    """Change one bit of one weight."""
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)


def truncate(directory: Path) -> None:
    """Lose the second half of the weights, with a hash that says all is well."""
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])
    digest = files.sha256(directory / "model.safetensors")
    edit_config(directory, lambda raw: raw.update(weights={"model.safetensors": digest}))


THETA = "blocks.0.token_mixer.lrpe.theta"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (flip_last_byte, r"model\.safetensors has SHA-256"),
    "truncated weights": (truncate, r"model\.safetensors is damaged"),
    "config is no JSON": (
        lambda d: (d / "config.json").write_text('{"format": 1'),
        r"config\.json is not JSON",
    ),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        r"config\.json holds a list",
    ),
    "of another program": (
        lambda d: edit_config(d, lambda c: c.update(model_type="gpt2")),
        r"model_type is 'gpt2'",
    ),
    "later format": (
        lambda d: edit_config(d, lambda c: c.update(format=2)),
        r"format is 2; expected 1",
    ),
    "unknown key": (
        lambda d: edit_config(d, lambda c: c["decoder"].update(widht=1)),
        r"widht is an unknown key",
    ),
    "other width": (
        lambda d: edit_config(d, lambda c: c["decoder"].update(vocab_size=60)),
        r"model\.safetensors: embedding\.weight has shape \[61, 32\]; expected \[60, 32\]",
    ),
    "tensor missing": (
        lambda d: edit_weights(d, lambda t: t.pop(THETA)),
        rf"lacks {THETA}",
    ),
    "tensor too many": (
        lambda d: edit_weights(d, lambda t: t.update(extra=torch.zeros(2))),
        r"model\.safetensors holds extra",
    ),
    "integers": (
        lambda d: edit_weights(d, lambda t: t.update({THETA: t[THETA].long()})),
        rf"{THETA} is torch\.int64",
    ),
    "two dtypes": (
        lambda d: edit_weights(
            d, lambda t: t.update({"embedding.weight": t["embedding.weight"].half()})
        ),
        r"stores weights in float16, float32; expected one dtype; pass dtype=",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(saved: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value)


def test_missing_things_are_not_found(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        checkpoint.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a file; expected the directory"):
        checkpoint.load(saved / "config.json")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is absent"):
        checkpoint.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        checkpoint.load(saved)


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("ran",))


def test_a_pickle_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or holds more than"):
        tensor_files.read_tensors(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_hub_id_is_downloaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_tensors(checkpoint.load("someone/model"), make_model())
    assert asked[0][0] == "someone/model"
    assert "*.safetensors" in asked[0][1]


@pytest.mark.parametrize("name", ["absent", "a/b/c", "exists/absent"])
def test_the_hub_is_not_asked_for_a_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match=f"{name} is not a directory; expected a run"):
        checkpoint.load(name)


def test_a_name_that_the_hub_does_not_know_is_not_found() -> None:
    with pytest.raises(FileNotFoundError, match="hub gave nothing under this name"):
        checkpoint.load("nobody/nothing-here")


def test_a_damaged_step_names_the_older_one_that_is_whole(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = [step_directory(run, step, saved, complete=True) for step in (1, 2, 3, 4)]
    flip_last_byte(steps[3])
    with pytest.raises(ValueError, match=r"step_00000004.*step_00000003 is whole: load that"):
        checkpoint.load(run)
    (steps[2] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step_00000004.*step_00000002 is whole: load that"):
        checkpoint.load(run)
    with pytest.raises(ValueError, match=r"step_00000003.*step_00000002 is whole: load that"):
        checkpoint.load(steps[2])
    for step in steps[:2]:
        flip_last_byte(step)
    with pytest.raises(ValueError, match=r"step_00000004.*copy it again$"):
        checkpoint.load(run)


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", refuse)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: No space left"):
        checkpoint.save(make_model(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved_or_loaded_says_so(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model is Linear; expected a Decoder"):
        checkpoint.save(torch.nn.Linear(2, 2), tmp_path / "linear")
    for dtype in ("bfloat16", torch.int64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="dtype is"):
            checkpoint.load(saved, dtype=dtype)


def test_a_link_is_written_through(saved: Path) -> None:
    link = saved.parent / "link"
    link.symlink_to(saved)
    checkpoint.save(make_model(tnl_config(vocab_size=7)), link)
    assert link.is_symlink()
    assert checkpoint.load(saved).config.vocab_size == 7
    assert sorted(p.name for p in saved.parent.iterdir()) == ["link", "model"]
