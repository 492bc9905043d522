"""vLLM where it is installed, and a small model as `transnormer convert` writes it."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_cases import TESTS, child

import transnormer
from transnormer import Decoder, zoo
from transnormer.models.decoder import DecoderConfig
from transnormer.nn.channel_mixers import FfnConfig
from transnormer.nn.norms import NormConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``vllm`` where there is none."""
    if find_spec("vllm") is not None:
        return
    reason = "vLLM is not installed; docs/vllm.md has the environment that it needs"
    for item in items:
        if item.get_closest_marker("vllm") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def write(config: DecoderConfig, folder: Path, *layouts: str) -> Path:
    """A new model of a configuration in some layouts, each a folder of this name.

    Its weights are large, so that greedy tokens do not repeat.
    """
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = config.model_copy(update={"init_std": 0.3, **ids})
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Biases begin at 0 and weights of norms at 1, where a wrong share would not show.
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    transnormer.save(model, folder / "transnormer")
    for layout in layouts:
        paths = (str(folder / "transnormer"), str(folder / layout))
        done = child("-m", "transnormer", "convert", *paths, "--to", layout)
        assert done.returncode == 0, done.stderr
    return folder


def tnl() -> DecoderConfig:
    """TransNormerLLM of three layers."""
    return zoo.tnl_custom(vocab_size=250, model_dim=64, num_layers=3, heads=4, glu_dim=96)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one TransNormerLLM in the layouts ``hf`` and ``released``."""
    return write(tnl(), tmp_path_factory.mktemp("toy"), "hf", "released")


@pytest.fixture(scope="session")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``toy`` with every switch that changes a layer: ``hf`` alone has them.

    A low-rank gate, LRPE in two layers, a weight in the norms, a plain feed-forward network, biases,
    a head of its own.
    """
    norm = NormConfig(kind="rms")
    mixer = {"gate": "low_rank", "gate_activation": "sigmoid", "norm": norm, "bias": True}
    blocks = [
        block.model_copy(
            update={
                "norm": norm,
                "token_mixer": block.token_mixer.model_copy(update={**mixer, "lrpe": index < 2}),
                "channel_mixer": FfnConfig(hidden_dim=96, bias=True)
                if index
                else block.channel_mixer,
            }
        )
        for index, block in enumerate(tnl().blocks)
    ]
    config = tnl().model_copy(update={"blocks": tuple(blocks), "tie_embeddings": False})
    return write(config, tmp_path_factory.mktemp("switched"), "hf")


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``engine(model, rounds, **options)``: what ``vllm_engine_case.run`` returns for them."""

    def run(model: Path, rounds: list[list[Any]], **options: Any) -> dict[str, Any]:
        job, answer = tmp_path / "job.json", tmp_path / "answer.json"
        job.write_text(json.dumps({"model": str(model), "rounds": rounds, "options": options}))
        done = child(str(TESTS / "vllm_engine_case.py"), str(job), str(answer))
        assert answer.is_file(), f"{done.stdout}\n{done.stderr}"
        return json.loads(answer.read_text("utf-8"))

    return run
