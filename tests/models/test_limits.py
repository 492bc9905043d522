"""Bounds of memory and speed: against counts by hand and the device's own table."""

import pytest
import torch

from transnormer.models import zoo
from transnormer.models.cost import ModelCost
from transnormer.models.device_peaks import find_peak, peak_of
from transnormer.models.limits import (
    decode_bounds,
    prefill_bound,
    serving_bytes,
    training_bound,
    training_bytes,
)

CONFIG = zoo.tnl("385m", vocab_size=64_000)
COST = ModelCost.of(CONFIG, torch.bfloat16)
H100 = find_peak("h100")[1]


def test_a_device_is_found_by_words_of_its_name() -> None:
    assert find_peak("H100") == ("NVIDIA H100 80GB HBM3", peak_of("NVIDIA H100 80GB HBM3"))
    assert find_peak("a100 80gb")[0] == "NVIDIA A100-SXM4-80GB"
    assert find_peak("h100-pcie")[0] == "NVIDIA H100 PCIe"
    assert find_peak("a10")[0] == "NVIDIA A10"
    for unknown in ("abacus", "a", ""):
        with pytest.raises(ValueError, match="expected words of one of: NVIDIA H100 80GB HBM3"):
            find_peak(unknown)


def test_serving_takes_all_weights_and_a_state() -> None:
    state = 25 * 8 * 128 * 128 * 4
    # The angles of the first layer stay float32.
    assert serving_bytes(CONFIG, 2048) == {
        "float32": 4 * 398_984_192 + state,
        "bfloat16": 2 * 398_984_192 + 2 * 8 * 128 + state,
    }
    growing = serving_bytes(zoo.get("hybrid-410m"), 100)
    more = serving_bytes(zoo.get("hybrid-410m"), 101)
    assert more["float32"] - growing["float32"] == 3 * (2 * 1024 * 4 + 1)


def test_training_takes_weights_gradients_and_two_moments() -> None:
    assert training_bytes(1000) == {"float32": 16_000, "bfloat16": 8_000}


def test_a_decoding_step_moves_its_bytes_or_computes_its_products() -> None:
    bounds = decode_bounds(COST, H100, "bfloat16", 2048, rows=(1, 256, 100_000))
    state = 25 * 8 * 128 * 128 * 4
    assert bounds[1] == H100.bandwidth / (COST.weight_bytes + 2 * state)
    assert bounds[256] == 256 / ((COST.weight_bytes + 256 * 2 * state) / H100.bandwidth)
    slow = H100._replace(bfloat16=1e9)
    flops = COST.flops(2048).total
    assert decode_bounds(COST, slow, "bfloat16", 2048, rows=(4,))[4] == pytest.approx(1e9 / flops)


def test_prompts_and_training_are_bound_by_products() -> None:
    flops = COST.flops(1024)
    assert prefill_bound(COST, H100, "bfloat16", 2048) == H100.bfloat16 / flops.blocks
    assert training_bound(COST, H100, "float32", 2048) == H100.float32 / (3.0 * flops.total)
