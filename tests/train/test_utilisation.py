"""Model FLOPs utilisation: what counts, and where it is shown."""

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_cases import Notes

from transnormer.cli.train import describe
from transnormer.models import checkpoint, zoo
from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.models.device_peaks import Peak, device_peak, peak_of
from transnormer.models.flop_formulas import flop_formulas
from transnormer.train import RunConfig, run_training, trainer
from transnormer.train.adapters import add_adapters
from transnormer.train.lora_config import LoraConfig
from transnormer.train.metrics import read_records
from transnormer.train.objective_config import InstructionConfig
from transnormer.train.utilisation import partly_trained_flops, token_share, training_flops

MakeConfig = Callable[..., RunConfig]


def model_of(config: RunConfig) -> Decoder:
    return Decoder(config.model.build(257, pad=None, bos=None, eos=None))


def test_a_trained_token_costs_three_forward_passes(make_config: MakeConfig) -> None:
    config = make_config()
    model = model_of(config)
    flops = ModelCost.of(model.config).flops(8).total
    assert training_flops(config, model) == 3 * flops
    peak = Peak(bfloat16=1e12, float32=1e11, bandwidth=1e9)
    assert token_share(config, model, peak, "bfloat16") == 3 * flops / 1e12
    assert token_share(config, model, peak, "float32") == 3 * flops / 1e11
    assert token_share(config, model, None, "float32") is None


def frozen(config: DecoderConfig, lora: LoraConfig, device: str) -> Decoder:
    with torch.device(device):
        model = Decoder(config)
        add_adapters(model, lora, "")
    return model


@pytest.mark.parametrize("targets", [None, ("down_proj",), ("out_proj",)], ids=str)
@pytest.mark.parametrize("family", ["tnl", "hgrn2"])
def test_frozen_weights_need_no_gradients(family: str, targets: tuple[str, ...] | None) -> None:
    small = zoo.get(f"small-{family}", vocab_size=61)
    config = small.model_copy(update={"blocks": small.blocks[:2]})
    lora = LoraConfig(rank=4, targets=targets)
    model, ids = frozen(config, lora, "cpu"), torch.zeros(2, 300, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        model.hidden(ids)[0].sum().backward()
    found = partly_trained_flops(frozen(config, lora, "meta"), 300)
    assert counter.get_total_flops() == 600 * found.blocks
    # The hidden states' gradient alone.
    assert found.head == 2 * ModelCost.of(config).flops(300).head


def test_a_run_with_adapters_counts_what_they_need(make_config: MakeConfig) -> None:
    config = make_config()
    model = model_of(config)
    adapters = {"objective": InstructionConfig(), "lora": LoraConfig(rank=2)}
    adapted = config.model_copy(update=adapters)
    whole, part = (training_flops(c, model) for c in (config, adapted))
    assert part == partly_trained_flops(frozen(model.config, LoraConfig(rank=2), "meta"), 8).total
    assert 0.6 < part / whole < 0.9


def test_growing_attention_over_packed_documents_is_not_guessed(make_config: MakeConfig) -> None:
    block = {"token_mixer": {"kind": "softmax", "heads": 2}, "channel_mixer": None}
    for packing, known in (("stream", True), ("documents", False)):
        data = make_config(f"data.packing={packing}").model_dump()
        data["model"] = {"model_dim": 16, "blocks": [block]}
        config = RunConfig.model_validate(data)
        assert (training_flops(config, model_of(config)) is not None) is known


def test_peaks_are_dense_rates_of_known_names() -> None:
    h100 = peak_of("NVIDIA H100 80GB HBM3")
    assert h100 == pytest.approx((989.4e12, 66.9e12, 3350e9))
    assert peak_of("NVIDIA Imagined 1") is None
    assert device_peak(torch.device("cpu")) is None


def test_the_log_line_and_the_record_show_it_where_it_is_known(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "device_peak", lambda device: Peak(1e9, 1e9, 1e9))
    run = run_training(make_config("train.steps=2"), progress=(notes := Notes())).run_dir
    report = notes.steps[-1]
    share = token_share(make_config(), checkpoint.load(run), Peak(1e9, 1e9, 1e9), "float32")
    assert report.mfu == pytest.approx(report.tokens_per_second * share)
    assert describe(report, 2).endswith(f"tokens/s  MFU {report.mfu:.1%}")
    assert read_records(run / "metrics.jsonl")[-1]["mfu"] == report.mfu
    assert describe(report._replace(mfu=None), 2).endswith("tokens/s")
