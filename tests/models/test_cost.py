"""The cost model: against counted operations, real tensors, and the published tables."""

import pytest
import torch
from decoder_cases import make_ids, tnl_config
from nn.mixer_cases import CASES, DIM, VOCAB, MixerCase
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from transnormer.models import zoo
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import BlockConfig, Decoder, DecoderConfig
from transnormer.models.flop_formulas import flop_formulas
from transnormer.nn.state import state_bytes
from transnormer.nn.token_mixers import LightningConfig, RetentionConfig
from transnormer.ops.linear_attention import chunked

# Shen et al. 2024 (arXiv:2406.16690), table 7: PFLOPs of a training step at a length of 8,192.
PFLOPS_PER_STEP = {
    "70m": (1.6, 0.5, 0.5, 0.5),
    "160m": (5.6, 2.2, 2.1, 2.3),
    "410m": (18.0, 7.9, 8.0, 8.1),
    "1b": (40.4, 22.3, 22.0, 22.7),
    "3b": (99.6, 66.6, 66.0, 67.4),
    "7b": (202.7, 154.4, 153.6, 155.6),
}
FAMILIES = ("llama", "tnl_scaling", "hgrn2", "cosformer2")
TOKENS_PER_STEP, LENGTH = 480 * 8192, 8192

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def in_float32(config: DecoderConfig) -> ModelCost:
    return ModelCost.of(config, torch.float32)


@every_case
def test_projections_are_what_is_counted(case: MixerCase) -> None:
    config, tokens = case.config(), 2 * 20
    with torch.device("meta"):
        model = Decoder(config).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 20, dtype=torch.int64))
    counts = counter.get_flop_counts()
    linear = [name for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    counted = sum(sum(counts[f"Decoder.{name}"].values()) for name in linear)
    flops = in_float32(config).flops(20)
    assert counted == tokens * flops.projections
    assert flops.head == 2 * DIM * VOCAB


def test_softmax_mixing_is_what_is_counted() -> None:
    config = zoo.llama_custom(vocab_size=61, model_dim=64, num_layers=1, heads=4, glu_dim=48)
    q, k, v = (torch.empty(1, 4, n, 16, device="meta") for n in (1, 300, 300))
    with FlopCounterMode(display=False) as counter:
        torch.softmax(q @ k.transpose(-1, -2), -1) @ v
    assert counter.get_total_flops() == in_float32(config).flops(300).mixing


@every_case
def test_bytes_of_states_are_those_of_real_ones(case: MixerCase) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cost, model = ModelCost.of(case.config(), dtype), case.model(dtype)
        for tokens in (1, 70):
            with torch.no_grad():
                state = model(make_ids(1, tokens) % VOCAB).state
            assert cost.state_bytes(tokens) == sum(state_bytes(layer) for layer in state.layers)


@every_case
def test_mixing_never_falls_with_the_context(case: MixerCase) -> None:
    cost = in_float32(case.config())
    flops = [cost.flops(n).mixing for n in (1, 2, 100, 10_000, 20_000)]
    assert flops[0] > 0
    assert flops == sorted(flops)
    # What grows for ever has a state that does.
    assert (flops[-1] > flops[-2]) == (cost.state_bytes_per_token > 0)
    if case.bidirectional:
        both = in_float32(case.config(causal=False))
        assert both.flops(100).mixing > 0
        assert both.state_bytes(100) == 0


def test_parameters_are_the_models() -> None:
    for config in (tnl_config(), tnl_config(tie_embeddings=False)):
        model, cost = Decoder(config), in_float32(config)
        assert cost.parameters == model.num_parameters()
        assert cost.without_embeddings == model.num_parameters(embeddings=False)
        # Everything but LRPE's theta is a matrix that multiplies every token.
        theta = model.blocks[0].token_mixer.lrpe.theta.numel()
        embedding = 0 if config.tie_embeddings else model.embedding.weight.numel()
        assert cost.active_parameters == model.num_parameters() - theta - embedding
        assert cost.weight_bytes == 4 * (model.num_parameters() - embedding)


def test_a_step_moves_weights_once_and_states_twice() -> None:
    recurrent, cached = (
        ModelCost.of(config) for config in (tnl_config(), zoo.llama("70m", vocab_size=100))
    )
    one, three = recurrent.decode_bytes(1, 1000), recurrent.decode_bytes(3, 1000)
    assert three - one == 2 * 2 * recurrent.state_bytes(1000)
    assert one - 2 * recurrent.state_bytes(1000) == recurrent.weight_bytes
    assert cached.decode_bytes(1, 1000) - cached.weight_bytes == cached.state_bytes(1001)


@pytest.mark.parametrize("size", PFLOPS_PER_STEP)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_costs_what_is_published(family: str, size: str) -> None:
    config = zoo.get(f"{family}-{size}")
    per_token = 3 * in_float32(config).flops(LENGTH).blocks
    # The table is of 12 d^2 parameters a layer, a GLU of 8 d / 3; models round that width up, by up
    # to an eighth in the small ones.
    dim = config.model_dim
    for block in config.blocks:
        if block.channel_mixer is not None:
            per_token -= 6 * (3 * dim * block.channel_mixer.hidden_dim - 8 * dim**2)
    if family == "cosformer2":
        # It also leaves out the Toeplitz encoding.
        with torch.device("meta"):
            tpe = config.blocks[0].token_mixer.build(dim, 0, 1, causal=True)
        per_token -= 3 * tpe.mixing_flops(LENGTH)
    published = PFLOPS_PER_STEP[size][FAMILIES.index(family)]
    assert TOKENS_PER_STEP * per_token / 1e15 == pytest.approx(published, abs=0.0501, rel=0.002)


@pytest.mark.parametrize("size", PFLOPS_PER_STEP)
def test_mixing_follows_the_published_formulas(size: str) -> None:
    # The same paper, table 2, per layer and token, forward: a third of 72 d^2 times n / 6d, 1 / 3h
    # (the gate's matrices are projections here) and 7 / 12h.
    for family, formula in zip(
        FAMILIES,
        (
            lambda d, h: 4 * LENGTH * d,
            lambda d, h: 8 * d * d / h,
            lambda d, h: 8 * d * d / h,
            lambda d, h: 14 * d * d / h,
        ),
        strict=True,
    ):
        config = zoo.get(f"{family}-{size}")
        dim, heads = config.model_dim, config.model_dim // 128
        with torch.device("meta"):
            mixer = config.blocks[-1].token_mixer.build(dim, 1, 2, causal=True)
        assert mixer.mixing_flops(LENGTH) == formula(dim, heads)


def test_a_context_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="context is 0; expected at least 1"):
        in_float32(tnl_config()).flops(0)


def counted(config: DecoderConfig, batch: int, seq: int, *, training: bool) -> int:
    """Operations of a loss, and of its backward pass, with the formulas of the package's ops."""
    model = Decoder(config).requires_grad_(training)
    ids = torch.zeros(batch, seq, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        loss = model.loss(ids, ids)
        if training:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["tnl", "retnet", "hgrn2", "lightnet"])
def test_a_training_step_is_counted_whole(family: str) -> None:
    # One block of each: a Toeplitz encoding, which is not an op of this kind, is left out.
    small = zoo.get(f"small-{family}", vocab_size=61)
    block = next(b for b in small.blocks if b.token_mixer.kind != "tpe")
    config = small.model_copy(update={"blocks": (block,)})
    tokens = 2 * 300
    flops = in_float32(config).flops(300)
    assert counted(config, 2, 300, training=False) == tokens * flops.total
    # The backward pass makes the logits once more; of the rest it is two products for each one.
    found = counted(config, 2, 300, training=True)
    assert found == tokens * (3 * flops.total + flops.head)


@pytest.mark.parametrize("kind", [LightningConfig, RetentionConfig])
def test_the_formula_of_attention_is_what_the_plain_form_does(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Opened, its products can be counted. Its chunks of 64 tokens are the formula's blocks here.
    monkeypatch.setattr(chunked, "_chunked", chunked._chunked._init_fn)
    block = BlockConfig(token_mixer=kind(heads=2), channel_mixer=None)
    config = DecoderConfig(vocab_size=8, model_dim=128, blocks=(block,))
    flops, model = in_float32(config).flops(256), Decoder(config).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.hidden(torch.zeros(1, 256, dtype=torch.int64))
    assert counter.get_total_flops() == 256 * flops.blocks
