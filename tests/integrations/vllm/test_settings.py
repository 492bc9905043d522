"""What the plugin refuses before vLLM builds anything."""

from pathlib import Path

import pytest
import torch
from vllm_cases import child

import transnormer
from transnormer import Decoder
from transnormer.models.zoo import hybrid_custom
from transnormer.nn.token_mixers import LightningConfig, SoftmaxConfig

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

_CONFIGURE = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
EngineArgs(sys.argv[1], skip_tokenizer_init=True, **json.loads(sys.argv[2])).create_engine_config()
"""


def test_a_hybrid_is_refused_by_name(tmp_path: Path) -> None:
    pattern = [LightningConfig(heads=4), SoftmaxConfig(heads=4)]
    config = hybrid_custom(vocab_size=250, model_dim=64, num_layers=2, glu_dim=96, pattern=pattern)
    torch.manual_seed(0)
    transnormer.save(Decoder(config), tmp_path / "saved")
    paths = (str(tmp_path / "saved"), str(tmp_path / "hf"))
    assert child("-m", "transnormer", "convert", *paths, "--to", "hf").returncode == 0
    done = child("-c", _CONFIGURE, paths[1], "{}")
    assert done.returncode != 0
    assert (
        "blocks[1].token_mixer.kind is 'softmax'; expected 'lightning' in every block"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{"mamba_cache_dtype": "float16"}', "expected 'auto' or 'float32'"),
        ('{"tensor_parallel_size": 3}', "expected a divisor of blocks[0].token_mixer.heads"),
        (
            '{"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}',
            "speculative_config is given; expected none",
        ),
    ],
    ids=["half state", "three ranks", "drafts"],
)
def test_options_that_cannot_hold_are_refused(toy: Path, options: str, message: str) -> None:
    done = child("-c", _CONFIGURE, str(toy / "hf"), options)
    assert done.returncode != 0
    assert message in done.stderr
