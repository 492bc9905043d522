"""Models in transformers' Auto classes: loading, saving, equality, packing, initialisation."""

import json
from pathlib import Path

import pytest
import torch
from decoder_cases import VOCAB, assert_logits_agree, make_ids, make_model, tnl_config
from hf_cases import hybrid_config, pair, wrapped
from nn.mixer_cases import CASES, MixerCase, ids_of
from safetensors.torch import load_file
from tolerances import DECODER_FLOAT64, INT8_MODEL, SPLIT_CPU, assert_close, relative_error
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    TorchAoConfig,
)

from transnormer.hf import (
    DecoderCache,
    TransnormerConfig,
    TransnormerDecoderConfig,
    TransnormerDecoderForMaskedLM,
    TransnormerForCausalLM,
)
from transnormer.models import checkpoint, zoo
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.zoo import get

CAUSAL = [case for case in CASES if not case.name.startswith("gau-quad")]


@pytest.fixture(params=["transnormer", "released"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def directory(tmp_path: Path, layout: str) -> Path:
    """A saved small TransNormerLLM."""
    checkpoint.save(make_model(), tmp_path / "model", layout=layout)
    return tmp_path / "model"


def test_a_saved_model_loads_with_equal_logits(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = make_ids(2, 20)
    assert torch.equal(model(ids).logits, make_model()(ids).logits)


def test_what_transformers_saves_this_package_loads(directory: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = checkpoint.load(tmp_path / "again")
    assert again.config == tnl_config()
    ids = make_ids(2, 20)
    assert torch.equal(again(ids).logits, make_model()(ids).logits)


@pytest.mark.parametrize("sizes", [("20KB", "5GB"), ("5GB", "20KB")], ids=["file", "shards"])
def test_a_save_replaces_the_weights_of_an_earlier_one(
    directory: Path, tmp_path: Path, sizes: tuple[str, str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "again", max_shard_size=sizes[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    model.save_pretrained(tmp_path / "again", max_shard_size=sizes[1])
    ids = make_ids(2, 20)
    wanted = model(ids).logits
    for again in (
        checkpoint.load(tmp_path / "again"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
    ):
        assert torch.equal(again(ids).logits, wanted)


def test_names_of_tensors_are_those_of_the_layout(directory: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "again")
    names = set(load_file(directory / "model.safetensors"))
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names


def test_a_model_without_its_head_loads(directory: Path) -> None:
    model = AutoModel.from_pretrained(directory)
    ids = make_ids(2, 9)
    assert torch.equal(model(ids).last_hidden_state, make_model().hidden(ids)[0])


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    original = make_model(tnl_config(tie_embeddings=False))
    checkpoint.save(original, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "again")
    ids = make_ids(2, 9)
    exact = original(ids).logits
    assert torch.equal(model(ids).logits, exact)
    assert torch.equal(checkpoint.load(tmp_path / "again")(ids).logits, exact)


@pytest.mark.parametrize("name", ["a_8heads", "b_6heads_alllrpe"])
def test_released_code_and_this_agree_in_float64(shared_dir: Path, name: str) -> None:
    directory = shared_dir / "conformance" / name
    vectors = load_file(directory / "vectors.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    ids = vectors["input_ids"]
    out = model(ids, labels=ids)
    assert_close(out.logits, vectors["logits_f64"], limit=DECODER_FLOAT64)
    # transformers computes losses in float32.
    assert_close(out.loss[None], vectors["loss_f64"], limit=DECODER_FLOAT64)


def test_code_that_a_released_directory_names_does_not_run(tmp_path: Path) -> None:
    checkpoint.save(make_model(), tmp_path, layout="released")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["auto_map"] = {
        "AutoConfig": "configuration_transnormer.TransnormerConfig",
        "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for name in ("configuration", "modeling"):
        (tmp_path / f"{name}_transnormer.py").write_text("raise SystemExit('remote code ran')\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is TransnormerForCausalLM
    ids = make_ids(2, 9)
    assert torch.equal(model(ids).logits, make_model()(ids).logits)


def test_half_precision_keeps_angles_and_decays(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    precise = {name for name, x in tensors.items() if x.dtype != torch.bfloat16}
    assert {name.rsplit(".", 1)[1] for name in precise} == {"theta", "log_decay"}
    exact = checkpoint.load(directory, dtype=torch.bfloat16)
    ids = make_ids(1, 9)
    assert torch.equal(model(ids).logits, exact(ids).logits)


@pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.name)
def test_every_mixer_computes_the_same_here(case: MixerCase) -> None:
    # In float32 some mixers, as these draw their weights, err by more than parts of a text may differ.
    original = case.model().double()
    model = wrapped(original)
    ids = ids_of(2, 13)
    with torch.no_grad():
        exact = original(ids).logits
        assert torch.equal(model(ids).logits, exact)
        cache = DecoderCache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 5], 1)]
    assert_logits_agree(torch.cat(parts, 1), exact, DECODER_FLOAT64)


@pytest.mark.parametrize("name", [n for n in zoo.names() if get(n).causal])
def test_every_published_size_has_a_configuration(name: str) -> None:
    config = TransnormerDecoderConfig(decoder=get(name))
    again = TransnormerDecoderConfig.from_dict(json.loads(config.to_json_string()))
    assert again.decoder_config() == get(name)
    assert len(again.layer_types) == again.num_hidden_layers


def test_a_published_size_is_made_without_a_file() -> None:
    config = TransnormerDecoderConfig(decoder=zoo.tnl("385m", vocab_size=100))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        exact = Decoder(zoo.tnl("385m", vocab_size=100)).num_parameters()
    assert sum(x.numel() for x in model.parameters()) == exact


def test_defaults_of_a_released_configuration_are_the_released_ones() -> None:
    config = TransnormerConfig().decoder_config()
    assert config == zoo.tnl("385m")


def test_a_new_model_is_initialised_as_by_this_package() -> None:
    config = TransnormerDecoderConfig(decoder=tnl_config(pad_token_id=0, tie_embeddings=False))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    assert abs(model.lm_head.weight.std().item() / 0.2 - 1) < 0.1
    assert abs(model.transnormer.embedding.weight[1:].std().item() / 0.2 - 1) < 0.1
    assert not bool(model.transnormer.embedding.weight[0].any())


def test_a_tensor_that_is_missing_is_initialised_and_the_others_are_not(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint.save(make_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = "blocks.1.token_mixer.out_proj.weight"
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = model.transnormer.state_dict()
    for name, x in tensors.items():
        assert torch.equal(found[name], x)
    assert abs(found[gone].std().item() / 0.2 - 1) < 0.1


def test_a_bidirectional_model_is_a_masked_one(tmp_path: Path) -> None:
    original = make_model(tnl_config(causal=False))
    checkpoint.save(original, tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(model) is TransnormerDecoderForMaskedLM
    ids = make_ids(2, 9)
    labels = torch.where(torch.arange(9) % 3 == 0, ids, -100).expand(2, -1)
    out = model(ids, labels=labels)
    assert torch.equal(out.logits, original(ids).logits)
    assert out.past_key_values is None
    torch.testing.assert_close(out.loss, original.loss(ids, labels))
    with pytest.raises(NotImplementedError, match="AutoModelForMaskedLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_loss_is_that_of_the_next_token() -> None:
    original, model = pair()
    ids = make_ids(2, 9)
    found = model(ids, labels=ids).loss
    torch.testing.assert_close(found, original.loss(ids[:, :-1], ids[:, 1:]))


def test_one_row_whose_positions_begin_anew_is_packed() -> None:
    for config in (tnl_config(), hybrid_config()):
        _, model = pair(config)
        parts = [make_ids(1, n, seed=n) for n in (4, 7, 2)]
        exact = torch.cat([model(x).logits for x in parts], 1)
        ids = torch.cat(parts, 1)
        where = torch.cat([torch.arange(x.shape[1]) for x in parts])[None]
        assert_logits_agree(model(ids, position_ids=where).logits, exact, SPLIT_CPU)
        bounds = torch.tensor([0, 4, 11, 13], dtype=torch.int32)
        found = model(ids, position_ids=where, cu_seq_lens_q=bounds).logits
        assert_logits_agree(found, exact, SPLIT_CPU)
        assert_logits_agree(model(ids, position_ids=where[0]).logits, exact, SPLIT_CPU)


@pytest.mark.parametrize("config", [tnl_config(), hybrid_config()], ids=["tnl", "hybrid"])
def test_several_rows_whose_positions_begin_anew_are_packed(config: DecoderConfig) -> None:
    _, model = pair(config)
    lengths = [(4, 7, 2), (6, 7), (13,)]
    parts = [[make_ids(1, n, seed=10 * row + n) for n in one] for row, one in enumerate(lengths)]
    exact = torch.cat([torch.cat([model(x).logits for x in row], 1) for row in parts])
    ids = torch.cat([torch.cat(row, 1) for row in parts])
    where = torch.stack([torch.cat([torch.arange(n) for n in one]) for one in lengths])
    found = model(ids, position_ids=where, attention_mask=torch.ones_like(ids))
    assert_logits_agree(found.logits, exact, SPLIT_CPU)
    assert found.past_key_values is None
    embedded = model.get_input_embeddings()(ids)
    assert_logits_agree(model(inputs_embeds=embedded, position_ids=where).logits, exact, SPLIT_CPU)
    # One line of positions is every row's.
    rows = torch.cat([ids[:1], ids[:1]])
    found = model(rows, position_ids=where[:1]).logits
    assert_logits_agree(found, torch.cat([exact[:1], exact[:1]]), SPLIT_CPU)
    with pytest.raises(NotImplementedError, match="with 3 rows of packed sequences"):
        model(ids, position_ids=where, output_hidden_states=True)


def test_packed_rows_are_refused_beside_a_cache_or_pads() -> None:
    _, model = pair()
    ids, where = make_ids(2, 6), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="anew at token 3 of row 1, beside past_key_values"):
        model(ids, position_ids=where, past_key_values=cache)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="anew at token 3 of row 1, beside attention_mask"):
        model(ids, position_ids=where, attention_mask=mask)
    # Pads have any position, on either side, and what follows them may skip theirs.
    left = torch.tensor([[1, 1, 0, 1, 2, 3], [0, 1, 1, 1, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]])
    exact = model(ids[:1, 2:]).logits
    found = model(ids, position_ids=left, attention_mask=mask).logits
    assert_logits_agree(found[:1, 2:], exact, SPLIT_CPU)


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_model_packs_as_an_eager_one(masked: bool) -> None:
    _, model = pair()
    parts = [make_ids(1, n, seed=n) for n in (4, 7)]
    ids = torch.cat(parts, 1)
    where = torch.cat([torch.arange(x.shape[1]) for x in parts])[None]
    mask = torch.ones_like(ids) if masked else None
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        exact = torch.cat([model(x).logits for x in parts], 1)
        found = compiled(ids, position_ids=where, attention_mask=mask, use_cache=False).logits
    assert_logits_agree(found, exact, SPLIT_CPU)


def test_ids_without_a_batch_are_refused() -> None:
    _, model = pair()
    with pytest.raises(ValueError, match=r"the input has shape \[5\]"):
        model(make_ids(1, 5)[0])


def test_hidden_states_are_those_between_the_blocks() -> None:
    original, model = pair()
    ids = make_ids(2, 9)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[-1], original.hidden(ids)[0])
    embedded = original.embedding(ids) * original.config.model_dim**0.5
    assert torch.equal(out.hidden_states[0], embedded)


def test_only_the_logits_that_are_asked_for_are_made() -> None:
    _, model = pair()
    ids = make_ids(2, 9)
    whole = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    some = torch.tensor([1, 5])
    assert torch.equal(model(ids, logits_to_keep=some).logits, whole[:, some])


def test_a_larger_vocabulary_is_saved_and_loaded(tmp_path: Path) -> None:
    _, model = pair()
    ids = make_ids(2, 9)
    exact = model(ids).logits
    model.resize_token_embeddings(VOCAB + 3)
    assert torch.equal(model(ids).logits[..., :VOCAB], exact)
    assert model(ids + 3).logits.shape[-1] == VOCAB + 3
    model.save_pretrained(tmp_path)
    assert checkpoint.load(tmp_path).config.vocab_size == VOCAB + 3
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == VOCAB + 3


def test_ids_that_the_caller_changes_are_saved(tmp_path: Path) -> None:
    _, model = pair()
    model.config.pad_token_id, model.config.eos_token_id = 5, [7, 8]
    model.save_pretrained(tmp_path)
    config = checkpoint.read_config(tmp_path)
    assert (config.pad_token_id, config.eos_token_id) == (5, 7)
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == [7, 8]


def test_a_mask_of_scores_is_refused() -> None:
    _, model = pair()
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(make_ids(2, 4), attention_mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("where", ["auto", {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_device_map_is_followed(directory: Path, where: str | dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, device_map=where)
    ids = make_ids(2, 9)
    assert torch.equal(model(ids).logits, make_model()(ids).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_of_eight_bits_are_made_saved_and_loaded(directory: Path, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="quantization needs torchao")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    ids = make_ids(2, 9)
    found = model(ids).logits
    # Rounding to 8 bits a row: a quarter of a percent a matrix, some ten matrices in a row.
    assert relative_error(found, make_model()(ids).logits) < INT8_MODEL
    theta = model.transnormer.blocks[0].token_mixer.lrpe.theta
    assert torch.equal(theta, make_model().blocks[0].token_mixer.lrpe.theta)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    assert torch.equal(again(ids).logits, found)
