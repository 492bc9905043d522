"""The state as an object: copies, rows, and files that know their model."""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoder_cases import make_ids, make_model, tnl_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transnormer.models.decoder import Decoder
from transnormer.models.fingerprint import fingerprint
from transnormer.models.state import DecoderState


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model()


def same(a: DecoderState, b: DecoderState) -> bool:
    layers = all(torch.equal(x, y) for x, y in zip(a.layers, b.layers, strict=True))
    return layers and torch.equal(a.positions, b.positions)


def test_saved_state_continues_exactly(model: Decoder, tmp_path: Path) -> None:
    state = model(make_ids(2, 30)).state
    state.save(tmp_path / "state.safetensors", model)
    loaded = DecoderState.load(tmp_path / "state.safetensors", model)
    assert same(loaded, state)
    ids = make_ids(2, 5, seed=8)
    assert torch.equal(model(ids, state=loaded).logits, model(ids, state=state).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_saved_state_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(dtype=dtype)
    state = model(make_ids(1, 5)).state
    state.save(tmp_path / "state", model)
    loaded = DecoderState.load(tmp_path / "state", model)
    assert same(loaded, state)
    assert loaded.layers[0].dtype == state.layers[0].dtype


def test_another_models_state_is_refused(model: Decoder, tmp_path: Path) -> None:
    model(make_ids(1, 5)).state.save(tmp_path / "state", model)
    other = make_model()
    with torch.no_grad():
        other.blocks[0].token_mixer.out_proj.weight += 1e-3
    with pytest.raises(ValueError, match=r"state.*expected.*fingerprint"):
        DecoderState.load(tmp_path / "state", other)


def test_damaged_and_missing_files_are_named(model: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match=str(path)):
        DecoderState.load(path, model)
    model(make_ids(1, 5)).state.save(path, model)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a state at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            DecoderState.load(path, model)


def test_a_file_that_is_no_state_is_refused(model: Decoder, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, str(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match="weights.safetensors"):
        DecoderState.load(tmp_path / "weights.safetensors", model)


def test_saving_leaves_no_other_file(model: Decoder, tmp_path: Path) -> None:
    state = model(make_ids(1, 5)).state
    for _ in range(2):
        state.save(tmp_path / "state", model)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_clone_shares_nothing(model: Decoder) -> None:
    state = model(make_ids(1, 5)).state
    copy = state.clone()
    copy.layers[0].zero_()
    copy.positions.zero_()
    assert bool((state.layers[0] != 0).any())
    assert state.positions.tolist() == [5]


def test_select_takes_rows_in_order(model: Decoder) -> None:
    ids = make_ids(3, 10)
    state = model(ids).state
    chosen = state.select([2, 0, 2])
    assert chosen.positions.tolist() == [10, 10, 10]
    assert torch.equal(chosen.layers[1], state.layers[1][[2, 0, 2]])
    assert same(state.select(torch.tensor([1])), state.select([1]))


def test_states_are_not_detached() -> None:
    state = make_model(tnl_config())(make_ids(1, 5)).state
    assert all(layer.requires_grad for layer in state.layers)
    assert not any(layer.requires_grad for layer in state.detach().layers)


def test_to_moves_layers_and_positions(model: Decoder) -> None:
    moved = model(make_ids(1, 5)).state.to("meta")
    assert {x.device.type for x in (*moved.layers, moved.positions)} == {"meta"}


def damage_bytes(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def damage_tokens(file: Path) -> None:
    content = file.read_bytes()
    assert content.count(b'"tokens":"30,30"') == 1
    file.write_bytes(content.replace(b'"tokens":"30,30"', b'"tokens":"30,31"'))


@pytest.mark.parametrize("damage", [damage_bytes, damage_tokens])
def test_a_changed_file_is_refused(
    damage: Callable[[Path], None], model: Decoder, tmp_path: Path
) -> None:
    file = tmp_path / "state.safetensors"
    model(make_ids(2, 30)).state.save(file, model)
    damage(file)
    with pytest.raises(ValueError, match="does not hold what was saved"):
        DecoderState.load(file, model)


def test_any_changed_weight_is_another_model() -> None:
    model = make_model(tnl_config(vocab_size=4099))
    before = model.fingerprint()
    with torch.no_grad():
        model.embedding.weight[1, 1] += 1.0
    assert model.fingerprint() != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_weights_in_another_order_are_another_model(dtype: torch.dtype) -> None:
    model = make_model(tnl_config(vocab_size=4099), dtype=dtype)
    # Entries next to each other, in other rows, at both ends, and in the last, shorter block.
    flat, found = model.embedding.weight.detach().view(-1), {model.fingerprint()}
    for i, j in ((1, 2), (3, 40), (70, 4096 + 71), (5, 131_167), (131_160, 131_161)):
        order = torch.arange(flat.numel())
        order[i], order[j] = j, i
        flat.copy_(flat[order])
        found.add(model.fingerprint())
        flat.copy_(flat[order])
    weight = model.blocks[0].token_mixer.out_proj.weight.detach()
    weight.copy_(weight.mT.clone())
    assert len(found | {model.fingerprint()}) == 7


def test_a_summary_is_the_sum_of_bits_by_place() -> None:
    places = (-49064778989728563, -4265267296055464877)

    def place(i: int) -> int:
        for factor in places:
            i = wrapped((i ^ (i >> 33)) * factor)
        return i ^ (i >> 33)

    def wrapped(i: int) -> int:
        return (i + 2**63) % 2**64 - 2**63

    x = torch.arange(5000.0)
    bits = x.view(torch.int32).tolist()
    sums = [
        wrapped(sum(b * place(i) for i, b in enumerate(block, start=1)))
        for block in (bits[:4096], bits[4096:])
    ]
    digest = hashlib.sha256(b"{}x [5000] torch.float32" + struct.pack("<2q", *sums))
    assert fingerprint("{}", {"x": x}) == f"2-{digest.hexdigest()}"


def test_a_state_with_a_fingerprint_of_the_earlier_kind_is_named(
    model: Decoder, tmp_path: Path
) -> None:
    file = tmp_path / "state.safetensors"
    model(make_ids(1, 5)).state.save(file, model)
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata() | {"fingerprint": "ab" * 32}
    save_file(load_file(file), file, metadata)
    with pytest.raises(ValueError, match="a fingerprint of an earlier kind, which did not see"):
        DecoderState.load(file, model)


def test_a_state_keeps_its_dtype_and_its_rows(model: Decoder) -> None:
    state = model(make_ids(2, 9)).state
    with pytest.raises(TypeError, match="keeps its dtype"):
        state.to(torch.bfloat16)
    with pytest.raises(TypeError, match="rows is torch.bool"):
        state.select(torch.tensor([False, True]))
    with pytest.raises(ValueError, match="expected indices from 0 to 1"):
        state.select([2])


def test_rows_that_share_memory_are_a_state_too(model: Decoder) -> None:
    state = model(make_ids(1, 9)).state
    shared = state._replace(
        layers=tuple(x.expand(3, -1, -1, -1) for x in state.layers),
        positions=state.positions.expand(3),
    )
    ids = make_ids(3, 7, seed=4)
    assert torch.equal(
        model(ids, state=shared).logits, model(ids, state=state.select([0, 0, 0])).logits
    )
