"""How the ranks of the tests begin a run; importable, since other processes run it."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transnormer.models.checkpoint import AnyConfig, AnyModel
from transnormer.models.classifier import SequenceClassifier
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.parallel.layout import Layout
from transnormer.parallel.local_layout import build_layout
from transnormer.train import OneProcess, RunConfig
from transnormer.train.adapter_layout import AdapterLayout
from transnormer.train.model_setup import set_up
from transnormer.train.objectives.base import load_initial

CPU = torch.device("cpu")


class Fresh:
    """Of an objective what a run begins with: the model."""

    def __init__(self, run: RunConfig, config: AnyConfig) -> None:
        self._run, self._config = run, config
        self.tokenizer: Any = SimpleNamespace(fingerprint="")

    def build_model(self) -> AnyModel:
        model = model_of(self._config)
        load_initial(getattr(model, "backbone", model), self._run, self.tokenizer)
        return model


def model_of(config: AnyConfig) -> AnyModel:
    return Decoder(config) if isinstance(config, DecoderConfig) else SequenceClassifier(config)


def begin(
    group: dist.ProcessGroup | None,
    run: RunConfig,
    config: AnyConfig,
    found: Path | None = None,
) -> dict[str, Any]:
    """Set a run up on the processes of a group, or on one process (None).

    Returns:
        what one process would have: "model", the whole tensors, with what is left over of weights
        that are rounded ("name/remainder"), on rank 0; and of each rank its
        "buffers", the next "random" number, and the most bytes that were "held" at once.
    """
    sync: Any = OneProcess()
    if group is not None:
        kind = Layout if run.lora is None else AdapterLayout
        sync = build_layout(
            run.parallel, dist.get_world_size(group), CPU, keeps_rest=run.splits_weights, kind=kind
        )
    objective: Any = Fresh(run, config)
    torch.manual_seed(run.train.seed)
    with Held() as held:
        model, optimizer = set_up(run, objective, found, CPU, sync)
    random = torch.rand(1)
    if run.train.weights == "bfloat16":
        # A step that changes nothing, behind which there are states.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.set_lr(0.0)
        optimizer.step()
    whole = sync.whole(model, optimizer)
    tensors = {}
    if whole is not None:
        tensors = {name: x.clone() for name, x in whole[0].state_dict().items()}
        tensors |= {name: x for name, x in whole[1].items() if name.endswith("/remainder")}
    return {
        "model": tensors,
        "buffers": dict(model.named_buffers()),
        "random": random,
        "held": held.most,
        "kept": sum(local(x).nbytes for x in model.state_dict().values()),
    }


def local(x: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


class Held(TorchDispatchMode):
    """Counts the bytes of the host's memory that operations make and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        # What a view shows was made before, or is a file's.
        given = {id(storage) for storage in storages((args, kwargs))}
        for storage in storages(made):
            if id(storage) not in given | self._seen:
                self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = id(storage), storage.nbytes()
        self._seen.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._seen.remove(place)
        self.now -= size


def storages(tensors: Any) -> list[torch.UntypedStorage]:
    """Where the tensors on the CPU lie."""
    parts = [local(x) for x in tree_leaves(tensors) if isinstance(x, Tensor)]
    return [x.untyped_storage() for x in parts if x.device.type == "cpu"]
