"""The released TransNormerLLM layout: outputs of the released code, exact round trips, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import assert_logits_agree, make_ids, make_model, tnl_config, variant_config
from safetensors.torch import load_file, save_file
from tolerances import DECODER_FLOAT32, DECODER_FLOAT64, SPLIT_CPU, relative_error
from torch import Tensor

from transnormer.models import checkpoint
from transnormer.models.convert import released
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.nn.channel_mixers import FfnConfig
from transnormer.nn.norms import NormConfig

CASES = ["a_8heads", "b_6heads_alllrpe"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared_dir: Path) -> tuple[Path, dict[str, Tensor]]:
    """A model directory of the released code and what that code computed with it."""
    directory = shared_dir / "conformance" / request.param
    return directory, load_file(directory / "vectors.safetensors")


Case = tuple[Path, dict[str, Tensor]]


def test_float64_logits_and_loss_are_those_of_the_released_code(case: Case) -> None:
    directory, vectors = case
    model = checkpoint.load(directory, dtype=torch.float64)
    ids = vectors["input_ids"]
    assert_logits_agree(model(ids).logits, vectors["logits_f64"], DECODER_FLOAT64)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert relative_error(loss, vectors["loss_f64"][0]) <= DECODER_FLOAT64


def test_float32_logits_are_those_of_the_released_code(case: Case) -> None:
    directory, vectors = case
    logits = checkpoint.load(directory)(vectors["input_ids"]).logits
    assert logits.dtype == torch.float32
    assert_logits_agree(logits, vectors["logits_f64"], DECODER_FLOAT32)
    assert_logits_agree(logits, vectors["logits_f32"], DECODER_FLOAT32)


def test_all_gradients_are_those_of_the_released_code(case: Case) -> None:
    directory, vectors = case
    model = checkpoint.load(directory, dtype=torch.float64)
    ids = vectors["input_ids"]
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    errors = {
        name: relative_error(parameter.grad, vectors[f"grad_{released.theirs(name)}"])
        for name, parameter in model.named_parameters()
    }
    assert len(errors) == sum(key.startswith("grad_") for key in vectors)
    assert max(errors.values()) <= DECODER_FLOAT64, errors


def test_prefill_then_steps_and_states_are_those_of_the_released_code(case: Case) -> None:
    directory, vectors = case
    model, ids = checkpoint.load(directory), vectors["input_ids"]
    half = ids.shape[1] // 2
    with torch.no_grad():
        logits, state = model(ids[:, :half])
        pieces = [logits]
        for t in range(half, ids.shape[1]):
            logits, state = model(ids[:, t : t + 1], state=state)
            pieces.append(logits)
    assert_logits_agree(torch.cat(pieces, 1), vectors["logits_prefill_then_steps_f32"], SPLIT_CPU)
    for index, layer in enumerate(state.layers):
        assert relative_error(layer, vectors[f"state_{index}_f32"]) <= SPLIT_CPU


def test_the_round_trip_of_released_weights_is_exact(case: Case, tmp_path: Path) -> None:
    directory, _ = case
    model = checkpoint.load(directory)
    checkpoint.save(model, tmp_path / "again", layout="released")
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old = json.loads((directory / "config.json").read_text())
    new = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: new[key] for key in old} == old
    assert checkpoint.load(tmp_path / "again").fingerprint() == model.fingerprint()


def split(names: list[str], parts: int) -> list[list[str]]:
    """Names in parts of about the same number."""
    return [names[part::parts] for part in range(parts)]


def write_form(form: str, tensors: dict[str, Tensor], directory: Path) -> None:
    """Write tensors as one of the forms that published checkpoints have."""
    if form == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    ending, index = {
        "sharded safetensors": ("safetensors", "model.safetensors.index.json"),
        "sharded bin": ("bin", "pytorch_model.bin.index.json"),
    }[form]
    stem, where = index.split(".")[0], {}
    for number, names in enumerate(split(sorted(tensors), 3), start=1):
        file = f"{stem}-{number:05d}-of-00003.{ending}"
        part = {name: tensors[name] for name in names}
        if ending == "bin":
            torch.save(part, directory / file)
        else:
            save_file(part, directory / file)
        where |= dict.fromkeys(names, file)
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


FORMS = ["bin", "sharded safetensors", "sharded bin"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weight_files_gives_the_same_model(
    case: Case, form: str, tmp_path: Path
) -> None:
    directory, _ = case
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    write_form(form, load_file(directory / "model.safetensors"), tmp_path)
    assert checkpoint.load(tmp_path).fingerprint() == checkpoint.load(directory).fingerprint()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A small untied model of our own in the released layout, special ids as released."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = make_model(tnl_config(tie_embeddings=False, **ids))
    checkpoint.save(model, tmp_path / "released", layout="released")
    return tmp_path / "released"


def edit(directory: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Change fields and tensors of a model directory."""
    fields = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    change(fields, tensors)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, directory / "model.safetensors"
    )


def layer(index: int, part: str) -> str:
    """The released name of a tensor."""
    return f"model.layers.{index}.{part}"


THETA, QKVU, L1 = (
    "token_mixer.lrpe.theta",
    "token_mixer.qkvu_proj.weight",
    "channel_mixer.l1.weight",
)


@pytest.mark.parametrize(
    "layers", [(0,), (1,), (0, 2), (), (0, 1, 2)], ids=lambda x: "-".join(map(str, x)) or "none"
)
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
def test_theta_may_be_in_any_layer(tmp_path: Path, layers: tuple[int, ...], listed: bool) -> None:
    config = tnl_config()
    blocks = [
        block.model_copy(
            update={"token_mixer": block.token_mixer.model_copy(update={"lrpe": i in layers})}
        )
        for i, block in enumerate(config.blocks)
    ]
    model = make_model(config.model_copy(update={"blocks": tuple(blocks)}))
    checkpoint.save(model, tmp_path / "m", layout="released")
    if not listed:
        edit(tmp_path / "m", lambda fields, _: fields.pop("linear_use_lrpe_list"))
    loaded = checkpoint.load(tmp_path / "m")
    assert [block.token_mixer.lrpe for block in loaded.config.blocks] == [
        i in layers for i in range(3)
    ]
    assert torch.equal(loaded(make_ids(1, 7)).logits, model(make_ids(1, 7)).logits)


def test_sizes_are_read_off_the_tensors(model_dir: Path) -> None:
    before = checkpoint.load(model_dir)
    sizes = [
        "vocab_size",
        "decoder_embed_dim",
        "decoder_layers",
        "decoder_attention_heads",
        "hidden_dim",
        "glu_dim",
        "linear_use_lrpe_list",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ]
    edit(model_dir, lambda fields, _: [fields.pop(name) for name in sizes])
    after = checkpoint.load(model_dir)
    assert after.config == before.config
    assert checkpoint.read_config(model_dir) == before.config


def test_a_glu_dim_of_minus_one_is_the_model_dim(tmp_path: Path) -> None:
    model = square_model()
    checkpoint.save(model, tmp_path / "m", layout="released")
    edit(tmp_path / "m", lambda fields, _: fields.update(glu_dim=-1))
    assert checkpoint.load(tmp_path / "m").config == model.config


def square_model() -> Decoder:
    """A model whose channel mixer is as wide as the model."""
    config = tnl_config()
    blocks = tuple(
        block.model_copy(
            update={"channel_mixer": block.channel_mixer.model_copy(update={"hidden_dim": 32})}
        )
        for block in config.blocks
    )
    return make_model(config.model_copy(update={"blocks": blocks}))


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (lambda f, t: (t.pop(HEAD), f.update(tie_word_embeddings=True)), True),
        (lambda f, t: (t.pop(HEAD), f.pop("tie_word_embeddings")), True),
        (lambda f, t: (t.update({HEAD: t[EMBEDDING].clone()}), f.pop("tie_word_embeddings")), True),
        (
            lambda f, t: (
                t.update({HEAD: t[EMBEDDING].clone()}),
                f.update(tie_word_embeddings=True),
            ),
            True,
        ),
        (lambda f, t: f.pop("tie_word_embeddings"), False),
        (lambda f, t: t.update({HEAD: t[EMBEDDING].clone()}), False),
    ],
    ids=["absent", "absent-unsaid", "equal-unsaid", "equal", "own-unsaid", "equal-but-untied"],
)
def test_the_head_is_tied_or_not(
    model_dir: Path, change: Callable[..., object], tied: bool
) -> None:
    edit(model_dir, change)
    assert checkpoint.load(model_dir).config.tie_embeddings is tied


INCONSISTENT: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "tied but different": (
        lambda f, t: f.update(tie_word_embeddings=True),
        r"model\.safetensors: lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "untied without a head": (lambda f, t: t.pop(HEAD), r"lacks lm_head\.weight"),
    "no embedding": (lambda f, t: t.pop(EMBEDDING), r"lacks model\.embed_tokens\.weight"),
    "no layers": (
        lambda f, t: [t.pop(name) for name in list(t) if "layers" in name],
        r"lacks model\.layers\.0",
    ),
    "vocabulary": (
        lambda f, t: f.update(vocab_size=60),
        r"vocab_size is 60; expected 61, by model",
    ),
    "width": (lambda f, t: f.update(decoder_embed_dim=64), r"decoder_embed_dim is 64; expected 32"),
    "layers": (lambda f, t: f.update(decoder_layers=4), r"decoder_layers is 4; expected 3"),
    "heads": (
        lambda f, t: f.update(decoder_attention_heads=4),
        r"decoder_attention_heads is 4; expected 2, by model\.layers\.0\.token_mixer\.lrpe\.theta",
    ),
    "hidden": (lambda f, t: f.update(hidden_dim=64), r"hidden_dim is 64; expected 32, by model"),
    "glu": (lambda f, t: f.update(glu_dim=-1), r"glu_dim is 32; expected 48, by model\.layers\.0"),
    "no heads anywhere": (
        lambda f, t: (
            f.pop("decoder_attention_heads"),
            f.pop("linear_use_lrpe_list"),
            t.pop(layer(0, THETA)),
        ),
        r"decoder_attention_heads is missing",
    ),
    "heads do not divide": (
        lambda f, t: (
            f.update(decoder_attention_heads=5, linear_use_lrpe_list=[]),
            t.pop(layer(0, THETA)),
        ),
        r"decoder_attention_heads is 5; expected a divisor of 32",
    ),
    "short list": (
        lambda f, t: f.update(linear_use_lrpe_list=[1]),
        r"linear_use_lrpe_list has 1 entries; expected 3",
    ),
    "theta not listed": (
        lambda f, t: f.update(linear_use_lrpe_list=[0, 0, 0]),
        r"holds model\.layers\.0\.token_mixer\.lrpe\.theta; expected none",
    ),
    "theta missing": (
        lambda f, t: f.update(linear_use_lrpe_list=[1, 1, 0]),
        r"lacks model\.layers\.1\.token_mixer\.lrpe\.theta",
    ),
    "theta of another shape": (
        lambda f, t: t.update({layer(0, THETA): torch.zeros(2, 1, 8)}),
        r"model\.safetensors: model\.layers\.0\.token_mixer\.lrpe\.theta has shape \[2, 1, 8\]; "
        r"expected \[2, 1, 16\]",
    ),
    "tensor missing": (
        lambda f, t: t.pop(layer(1, QKVU)),
        r"lacks model\.layers\.1\.token_mixer\.qkvu_proj\.weight",
    ),
    "tensor of another shape": (
        lambda f, t: t.update({layer(2, L1): torch.zeros(47, 32)}),
        r"model\.layers\.2\.channel_mixer\.l1\.weight has shape \[47, 32\]; expected \[48, 32\]",
    ),
    "vector for a matrix": (
        lambda f, t: t.update({layer(0, L1): torch.zeros(48)}),
        r"model\.layers\.0\.channel_mixer\.l1\.weight has shape \[48\]; expected 2 dims",
    ),
    "unknown tensor": (
        lambda f, t: t.update({"model.norm.weight": torch.zeros(3)}),
        r"model\.safetensors holds model\.norm\.weight",
    ),
    "wrong type": (
        lambda f, t: f.update(decoder_layers="three"),
        r"decoder_layers is 'three'; expected an integer",
    ),
}


@pytest.mark.parametrize("name", INCONSISTENT)
def test_what_does_not_agree_is_one_line(model_dir: Path, name: str) -> None:
    change, message = INCONSISTENT[name]
    edit(model_dir, change)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(model_dir)
    assert "\n" not in str(caught.value)
    assert str(model_dir) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, index: index["weight_map"].pop(HEAD), r"holds lm_head\.weight, which"),
        (lambda d, index: index["weight_map"].update(x=index["weight_map"][HEAD]), r"lacks x"),
        (lambda d, index: index.pop("weight_map"), r"has no weight_map"),
        (
            lambda d, index: index["weight_map"].update({HEAD: "../elsewhere.safetensors"}),
            r"names the file '\.\./elsewhere\.safetensors'",
        ),
        (
            lambda d, index: (d / index["weight_map"][HEAD]).write_bytes(b"1234567890"),
            r"of-00003\.safetensors is damaged",
        ),
    ],
    ids=["unlisted", "unheld", "empty", "outside", "damaged"],
)
def test_an_index_must_agree_with_its_shards(
    model_dir: Path, change: Callable[..., object], message: str
) -> None:
    write_form("sharded safetensors", load_file(model_dir / "model.safetensors"), model_dir)
    (model_dir / "model.safetensors").unlink()
    path = model_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(model_dir, index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(model_dir)


def test_an_absent_shard_is_named(model_dir: Path) -> None:
    write_form("sharded safetensors", load_file(model_dir / "model.safetensors"), model_dir)
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors is absent"):
        checkpoint.load(model_dir)


@pytest.mark.parametrize(
    ("field", "value"), [("norm_type", "layernorm"), ("linear_act_fun", "sine")]
)
def test_parts_that_the_decoder_lacks_are_refused(model_dir: Path, field: str, value: str) -> None:
    edit(model_dir, lambda fields, _: fields.update({field: value}))
    with pytest.raises(NotImplementedError, match=f"{field} is '{value}'"):
        checkpoint.load(model_dir)


def test_names_are_those_of_the_released_code() -> None:
    expected = {
        "embedding.weight": EMBEDDING,
        "lm_head.weight": HEAD,
        "blocks.12.token_mixer.qkvu_proj.weight": layer(12, QKVU),
        "blocks.0.token_mixer.lrpe.theta": layer(0, THETA),
        "blocks.3.channel_mixer.gate_proj.weight": layer(3, L1),
        "blocks.3.channel_mixer.up_proj.weight": layer(3, "channel_mixer.l2.weight"),
        "blocks.3.channel_mixer.down_proj.weight": layer(3, "channel_mixer.l3.weight"),
    }
    assert {name: released.theirs(name) for name in expected} == expected
    assert {released.ours(name): name for name in expected.values()} == expected
    assert released.ours("model.layers.0.token_mixer.slopes") is None


def with_block(index: int, **changes: object) -> DecoderConfig:
    """The small model with one block changed."""
    config = tnl_config()
    blocks = list(config.blocks)
    blocks[index] = blocks[index].model_copy(update=changes)
    return config.model_copy(update={"blocks": tuple(blocks)})


INEXPRESSIBLE = {
    r"config\.blocks\[0\]\.token_mixer\.gate is 'low_rank'": variant_config({"gate": "low_rank"}),
    r"config\.blocks\[0\]\.token_mixer\.decay is 'paper'": variant_config({"decay": "paper"}),
    r"config\.blocks\[0\]\.token_mixer\.v_activation": variant_config({"v_activation": "silu"}),
    r"config\.blocks\[0\]\.channel_mixer\.activation": variant_config(glu={"activation": "silu"}),
    r"config\.blocks\[0\]\.norm\.kind is 'rms'": variant_config(norm=NormConfig(kind="rms")),
    r"config\.blocks\[1\]\.channel_mixer\.kind is 'ffn'; expected 'glu', the only": with_block(
        1, channel_mixer=FfnConfig(hidden_dim=48)
    ),
    r"config\.blocks\[2\]\.norm\.eps": with_block(2, norm=NormConfig(eps=1e-5)),
    r"config\.causal is False": tnl_config(causal=False),
    r"config\.max_positions is 64": tnl_config(max_positions=64),
    r"config\.dropout is 0\.1": tnl_config(dropout=0.1),
}


@pytest.mark.parametrize("message", INEXPRESSIBLE)
def test_what_the_layout_cannot_say_is_refused_by_name(tmp_path: Path, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        checkpoint.save(make_model(INEXPRESSIBLE[message]), tmp_path / "m", layout="released")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        tnl_config(pad_token_id=3, eos_token_id=None),
        variant_config({"bias": True, "qk_activation": "1+elu"}),
        variant_config({"hidden_dim": 64}, lrpe="none"),
        tnl_config(embedding_scale=False),
    ],
    ids=["special-ids", "bias-activation", "hidden", "no-scale"],
)
def test_what_the_layout_can_say_comes_back(tmp_path: Path, config: DecoderConfig) -> None:
    model = make_model(config)
    checkpoint.save(model, tmp_path / "m", layout="released")
    loaded = checkpoint.load(tmp_path / "m")
    assert loaded.config == config
    assert loaded.fingerprint() == model.fingerprint()


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout is 'gguf'; expected 'transnormer' or 'released'"):
        checkpoint.save(make_model(), tmp_path / "m", layout="gguf")
