"""What several processes refuse, before any of them is joined."""

from collections.abc import Callable

import pytest
import torch

from transnormer.train import RunConfig
from transnormer.train.processes import join_processes

MakeConfig = Callable[..., RunConfig]
OUTER = ("parallel.dp_replicate=2", "parallel.outer.method=co2", "parallel.outer.tau=2")
TEXTS = ("objective.kind=classification", "model.causal=false", "data.path=texts.jsonl")
ADAPTED = (
    "model={init_from='base'}",
    "objective.kind=instruction",
    "data.path=lines.jsonl",
    "lora.rank=2",
)
REFUSED = {
    "cuda-graph": (["train.cuda_graph=true"], "train.cuda_graph is True; .* not captured; set it"),
    "texts": ([*TEXTS, "parallel.sp=2"], "objective.kind is 'classification'; .* set parallel.sp"),
    "adapters-tp": ([*ADAPTED, "parallel.tp=2"], "lora is LoraConfig.* set parallel.tp to 1"),
    "adapters-apart": ([*ADAPTED, *OUTER], r"lora is LoraConfig.* leave \[parallel.outer\] out"),
    "segments": (
        ["train.segment_tokens=8", "parallel.tp=2"],
        "train.segment_tokens is 8; .* set parallel.tp to 1",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_several_processes_refuse_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    overrides, message = REFUSED[name]
    for variable, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(variable, value)
    with pytest.raises(NotImplementedError, match=message) as found:
        join_processes(make_config(*overrides), torch.device("cpu"))
    assert "\n" not in str(found.value)
