"""LLaMA: transformers computes the same, both ways; sizes; generation, states and refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import VOCAB, assert_logits_agree, make_ids, make_model
from safetensors.torch import load_file, save_file
from tolerances import DECODER_FLOAT32, SPLIT_CPU
from torch import Tensor

from transnormer.eval.perplexity import score_tokens
from transnormer.infer.generate import generate
from transnormer.models import checkpoint, zoo
from transnormer.models.convert import llama
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.state import DecoderState
from transnormer.nn.norms import NormConfig
from transnormer.nn.token_mixers import LightningConfig, SoftmaxConfig

DIM, HEADS, KV_HEADS, HIDDEN, LAYERS = 32, 4, 2, 48, 2


def small(**changes: Any) -> DecoderConfig:
    """A small LLaMA of grouped heads, with weights so wide that every term matters."""
    config = zoo.llama_custom(
        vocab_size=VOCAB,
        model_dim=DIM,
        num_layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        glu_dim=HIDDEN,
    )
    return config.model_copy(update={"init_std": 0.2, **changes})


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model(small())


# Sizes.

# Shen et al. 2024, arXiv:2406.16690, table of sizes: parameters without embeddings in millions. The
# table counts two vectors a norm; RMSNorm has one.
SCALING = {"70m": 20.5, "160m": 85.0, "410m": 334.1, "1b": 906.2, "3b": 2775.8, "7b": 6476.5}
# The released weights of the original LLaMA.
ORIGINAL = {
    "6.7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "32.5b": 32_528_943_616,
    "65b": 65_285_660_672,
}


def on_meta(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize("size", SCALING)
def test_sizes_of_the_scaling_laws(size: str) -> None:
    model = on_meta(zoo.get(f"llama-{size}"))
    norms = sum(x.numel() for x in model.parameters() if x.dim() == 1)
    count = model.num_parameters(embeddings=False) + norms
    assert count / 1e6 == pytest.approx(SCALING[size], abs=0.051)
    assert model.blocks[0].token_mixer.head_dim == 128
    # The head is the embedding.
    assert model.num_parameters() - model.num_parameters(embeddings=False) == (
        100_280 * model.config.model_dim
    )


@pytest.mark.parametrize("size", ORIGINAL)
def test_sizes_of_the_original(size: str) -> None:
    model = on_meta(zoo.get(f"llama-{size}"))
    assert model.num_parameters() == ORIGINAL[size]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size is '8b'.*6\.7b"):
        zoo.llama("8b")
    sizes = {"vocab_size": 10, "model_dim": 16, "num_layers": 1, "heads": 2, "glu_dim": 8}
    for changes in ({"heads": 3}, {"num_layers": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            zoo.llama_custom(**(sizes | changes))
    with pytest.raises(ValueError, match="kv_heads is 3"):
        zoo.llama_custom(**(sizes | {"kv_heads": 3, "heads": 4}))


# Transformers.

HF_FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": HEADS},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "wide heads, far base": {
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "hidden_act": "gelu",
    },
}


def hf_model(**changes: Any) -> Any:
    """A random LlamaForCausalLM whose norms and biases are not at their neutral values."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**(HF_FIELDS | changes), attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() == 1:
                x.add_(torch.randn_like(x) * 0.2)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_directory_of_transformers_gives_the_same_logits_and_text(
    variant: str, tmp_path: Path
) -> None:
    theirs = hf_model(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    model = checkpoint.load(tmp_path)
    ids = make_ids(2, 100)
    with torch.no_grad():
        exact = theirs(ids).logits
        assert_logits_agree(model(ids).logits, exact, DECODER_FLOAT32)
    wanted = theirs.generate(ids[:, :7], max_new_tokens=20, do_sample=False)
    generation = generate(model, ids[:, :7], max_new_tokens=20, temperature=0.0)
    list(generation)
    assert generation.token_ids == wanted[:, 7:].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_what_is_saved(variant: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = hf_model(**VARIANTS[variant])
    source.save_pretrained(tmp_path / "theirs")
    model = checkpoint.load(tmp_path / "theirs")
    llama.save(model, tmp_path / "ours", max_position_embeddings=512)
    again, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    ids = make_ids(2, 60)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, source(ids).logits)
    ours, theirs = again.config.to_dict(), source.config.to_dict()
    differing = {key for key in theirs if ours.get(key) != theirs[key]}
    assert differing <= {"_name_or_path", "dtype", "transformers_version", "architectures"}


def test_a_bfloat16_directory_stays_bfloat16(tmp_path: Path) -> None:
    hf_model().bfloat16().save_pretrained(tmp_path)
    model = checkpoint.load(tmp_path)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert model.blocks[0].token_mixer.rotary.theta.dtype == torch.float64
    state = model(make_ids(1, 5)).state
    assert state.layers[0].keys.dtype == torch.bfloat16


# Files of the layout, without transformers.


@pytest.fixture
def directory(model: Decoder, tmp_path: Path) -> Path:
    """A directory of the layout."""
    llama.save(model, tmp_path / "llama")
    return tmp_path / "llama"


def edit(directory: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Change fields and tensors of a directory."""
    fields = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    change(fields, tensors)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(tensors, directory / "model.safetensors")


def test_the_round_trip_is_exact(model: Decoder, directory: Path) -> None:
    again = checkpoint.load(directory)
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    assert checkpoint.read_config(directory) == model.config
    names = set(load_file(directory / "model.safetensors"))
    assert "model.layers.1.self_attn.o_proj.weight" in names
    assert "model.layers.0.post_attention_layernorm.weight" in names


def test_both_layouts_go_into_each_other(directory: Path, tmp_path: Path) -> None:
    checkpoint.save(checkpoint.load(directory), tmp_path / "plain")
    llama.save(checkpoint.load(tmp_path / "plain"), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def older_file(fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What files from before transformers 5 hold."""
    fields |= {"rope_scaling": None, "rope_theta": 10_000, "pad_token_id": -1, "swa": "unknown"}
    for key in ("rope_parameters", "head_dim"):
        del fields[key]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def test_older_files_are_read(model: Decoder, directory: Path) -> None:
    edit(directory, older_file)
    assert checkpoint.load(directory).fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rope_theta": 77.0}, 10_000.0),
        ({"rope_theta": 77.0, "rope_parameters": None}, 77.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 55.0}}, 55.0),
        ({"rope_scaling": {"type": "default", "rope_theta": 44.0}}, 44.0),
        ({"eos_token_id": [7]}, 10_000.0),
    ],
    ids=lambda x: str(x) if isinstance(x, float) else "-".join(x),
)
def test_the_rotary_base_is_found(change: dict[str, Any], found: float, directory: Path) -> None:
    edit(directory, lambda fields, _: fields.update(change))
    config = checkpoint.load(directory).config
    assert config.blocks[0].token_mixer.rope_base == found
    assert config.eos_token_id == (7 if "eos_token_id" in change else None)


@pytest.mark.parametrize("field", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_minus_one_is_no_id(field: str, directory: Path) -> None:
    edit(directory, lambda fields, _: fields.update({field: -1}))
    assert getattr(checkpoint.load(directory).config, field) is None


REFUSED_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "llama 3 scaling": ({"rope_parameters": {"rope_type": "llama3"}}, r"rope_type is 'llama3'"),
    "linear scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        r"rope_scaling.*linear",
    ),
    "partial": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    "partial, older": ({"partial_rotary_factor": 0.5}, r"json: partial_rotary_factor is 0\.5"),
    "activation": ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "several ends": ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_a_field_that_cannot_be_expressed_is_named(name: str, directory: Path) -> None:
    change, message = REFUSED_FIELDS[name]
    edit(directory, lambda fields, _: fields.update(change))
    with pytest.raises(NotImplementedError, match=message):
        checkpoint.load(directory)


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "absent": (
        lambda f, t: t.pop("model.layers.1.mlp.up_proj.weight"),
        r"lacks model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "no head": (lambda f, t: t.pop("lm_head.weight"), r"lacks lm_head\.weight"),
    "another head": (
        lambda f, t: f.update(tie_word_embeddings=True),
        r"lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "unknown": (
        lambda f, t: _rename(t, "model.norm.weight", "model.other.weight"),
        r"holds model\.other\.weight",
    ),
    "shape": (
        lambda f, t: f.update(num_key_value_heads=4),
        r"self_attn\.k_proj\.weight has shape \[16, 32\]; expected \[32, 32\]",
    ),
    "layers": (lambda f, t: f.update(num_hidden_layers=1), r"holds model\.layers\.1\."),
    "type": (lambda f, t: f.update(hidden_size="32"), "hidden_size"),
    "table": (lambda f, t: f.update(rope_parameters=[1]), "rope_parameters"),
    "no heads": (
        lambda f, t: f.update(num_attention_heads=0),
        r"^num_attention_heads is 0; expected.*config\.json\)$",
    ),
    "no layers": (
        lambda f, t: f.update(num_hidden_layers=0),
        r"^num_hidden_layers is 0; .*json\)$",
    ),
    "pad": (
        lambda f, t: f.update(pad_token_id=1000),
        r"^pad_token_id is 1000; expected less than vocab_size, which is .*config\.json\)$",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_fields_and_tensors_that_do_not_agree_are_named(name: str, directory: Path) -> None:
    change, message = DAMAGE[name]
    edit(directory, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(directory)


def _with_block(config: DecoderConfig, index: int, **update: Any) -> DecoderConfig:
    blocks = list(config.blocks)
    blocks[index] = blocks[index].model_copy(update=update)
    return config.model_copy(update={"blocks": tuple(blocks)})


NOT_LLAMA: dict[str, tuple[DecoderConfig, str]] = {
    "mixer": (
        _with_block(small(), 1, token_mixer=LightningConfig(heads=2)),
        r"blocks\[1\]\.token_mixer\.kind is 'lightning'; expected 'softmax'",
    ),
    "no channel mixer": (
        _with_block(small(), 0, channel_mixer=None),
        r"blocks\[0\]\.channel_mixer\.kind is None",
    ),
    "no positions": (
        _with_block(small(), 0, token_mixer=SoftmaxConfig(heads=HEADS, rope_base=None)),
        r"blocks\[0\]\.token_mixer\.rope_base is None",
    ),
    "uneven layers": (
        _with_block(small(), 1, token_mixer=SoftmaxConfig(heads=2)),
        r"blocks\[1\]\.token_mixer\.heads is 2",
    ),
    "norm": (small(final_norm=NormConfig()), r"final_norm\.kind is 'srms'"),
    "scale": (small(embedding_scale=True), "embedding_scale is True"),
    "direction": (small(causal=False), "causal is False"),
    "dropout": (small(dropout=0.1), r"dropout is 0\.1"),
}


@pytest.mark.parametrize("name", NOT_LLAMA)
def test_saving_what_the_layout_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    config, message = NOT_LLAMA[name]
    with pytest.raises(NotImplementedError, match=message):
        llama.save(Decoder(config), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_somebodys_directory_is_not_replaced(model: Decoder, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        llama.save(model, tmp_path)


# Generation, states and scores.


def greedy_by_forward(model: Decoder, prompt: Tensor, count: int) -> list[int]:
    """Greedy continuation without any state: the whole text is read anew for each token."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_ragged_prompts_generate_as_alone(model: Decoder) -> None:
    prompts = [make_ids(1, length, seed=length)[0] for length in (5, 1, 40)]
    exact = [greedy_by_forward(model, prompt, 8) for prompt in prompts]
    # A row that stops early leaves the others as they are.
    stop = exact[1][2]
    generation = generate(model, prompts, max_new_tokens=8, temperature=0.0, stop=stop)
    list(generation)
    for row, ids in enumerate(exact):
        end = ids.index(stop) + 1 if stop in ids else len(ids)
        assert generation.token_ids[row] == ids[:end]
    state = generation.state
    assert state.positions.tolist() == [
        len(prompt) + len(ids) for prompt, ids in zip(prompts, generation.token_ids)
    ]


def test_generation_goes_on_from_its_state_through_a_file(model: Decoder, tmp_path: Path) -> None:
    prompts = [make_ids(1, length, seed=length)[0] for length in (5, 12)]
    first = generate(model, prompts, max_new_tokens=4, temperature=0.0)
    list(first)
    first.state.save(tmp_path / "state", model)
    state = DecoderState.load(tmp_path / "state", model)
    question = make_ids(1, 3, seed=8)[0]
    second = generate(model, [question] * 2, max_new_tokens=5, temperature=0.0, state=state)
    list(second)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, torch.tensor(first.token_ids[row]), question])
        assert second.token_ids[row] == greedy_by_forward(model, text, 5)


def test_rows_of_a_state_are_selected_and_copied(model: Decoder) -> None:
    ids = make_ids(3, 20)
    with torch.no_grad():
        state = model(ids).state
        chosen = state.select([2, 0, 2])
        copy = chosen.clone()
        for x in copy.layers:
            x.keys.zero_()
        more = make_ids(1, 4, seed=9).expand(3, -1)
        logits = model(more, state=chosen).logits
        exact = model(torch.cat([ids[[2, 0, 2]], more], 1)).logits[:, -4:]
    assert_logits_agree(logits, exact, SPLIT_CPU)
    assert state.layers[0].keys.shape == (3, 20, KV_HEADS, DIM // HEADS)
    assert state.positions.tolist() == [20] * 3


def test_scores_do_not_depend_on_the_chunk(model: Decoder) -> None:
    documents = [make_ids(1, length, seed=length)[0].tolist() for length in (50, 3, 21)]
    whole = score_tokens(model, documents, first_id=0)
    parts = score_tokens(model, documents, first_id=0, chunk=7)
    for ids, one, other in zip(documents, whole, parts, strict=True):
        inputs = torch.tensor([[0, *ids[:-1]]])
        exact = model.loss(inputs, torch.tensor([ids]), reduction="sum").item()
        assert math.isclose(one.nats, exact, rel_tol=1e-5)
        assert math.isclose(other.nats, exact, rel_tol=1e-5)


def test_training_builds_no_state(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # The rows of a packed batch's states are as long as its longest document, for every layer.
    asked = []
    for block in model.blocks:
        monkeypatch.setattr(
            block.token_mixer, "forward", _watched(block.token_mixer.forward, asked)
        )
    ids, bounds = make_ids(1, 30), torch.tensor([0, 2, 30])
    model.loss(ids, ids, cu_seqlens=bounds)
    assert asked == [None] * LAYERS
    assert model(ids, cu_seqlens=bounds).state.layers[0].keys.shape[:2] == (2, 28)


def _watched(forward: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def watch(*args: Any, **options: Any) -> Any:
        y, state = forward(*args, **options)
        seen.append(state)
        return y, state

    return watch
