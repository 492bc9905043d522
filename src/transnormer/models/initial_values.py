"""The initial values of a new model a part at a time, for a model that was built without memory."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from transnormer.models.assembly import compute_buffers
from transnormer.models.checkpoint import AnyModel
from transnormer.models.decoder import Decoder
from transnormer.models.resets import reset_others, reset_projections

ModelT = TypeVar("ModelT", bound=nn.Module)


def build_on_meta(build: Callable[[], ModelT]) -> ModelT:
    """Build a model on the meta device, with its computed buffers on the CPU.

    Draws no random numbers.

    Args:
        build: makes the model; where it names a device itself, it stays as it was made there.
    """
    with torch.device("meta"):
        model = build()
    if not next(model.parameters()).is_meta:
        return model
    real = copy.deepcopy(model)
    with torch.random.fork_rng(devices=()):
        compute_buffers(real, (), "cpu")
    for module, like in zip(model.modules(), real.modules(), strict=True):
        for name, buffer in like.named_buffers(recurse=False):
            setattr(module, name, buffer)
    return model


def initial_values(model: AnyModel) -> Iterator[dict[str, Tensor]]:
    """What the tensors of a model of this configuration would begin with on the CPU, bit for bit.

    They are drawn as they are asked for, embeddings, each block and the head on their own, and lie
    in memory until the next ones are asked for. The CPU's random numbers go the same way as there:
    first what torch's layers draw for themselves and nobody keeps, then all projections, then what
    other modules draw. A part with such modules waits for those of all parts: its projections are
    drawn once more.

    Args:
        model: on the meta device, as it was built; may change while they are drawn.

    Returns:
        the tensors of one part at a time, by their names in the model.
    """
    return _values(copy.deepcopy(model))


def _values(model: AnyModel) -> Iterator[dict[str, Tensor]]:
    if isinstance(model, Decoder):
        yield from _decoder_values(model, "")
        return
    yield from _decoder_values(model.backbone, "backbone.")
    _skip(lambda: nn.Linear(model.head.in_features, model.head.out_features))
    model.head.to_empty(device="cpu")
    model.reset_head()
    yield from _shown("head.", model.head)


def _decoder_values(model: Decoder, name: str) -> Iterator[dict[str, Tensor]]:
    _skip(lambda: Decoder(model.config))
    std, waiting = model.config.init_std, []
    for prefix, part in _parts(model):
        start = torch.get_rng_state()
        reset_projections(part.to_empty(device="cpu"), std)
        behind = torch.get_rng_state()
        reset_others(part)
        if part is model.embedding:
            model.reset_pad_row()
        if torch.equal(torch.get_rng_state(), behind):
            yield from _shown(name + prefix, part)
        else:
            part.to("meta")
            torch.set_rng_state(behind)
            waiting.append((prefix, part, start))
    for prefix, part, start in waiting:
        behind = torch.get_rng_state()
        torch.set_rng_state(start)
        reset_projections(part.to_empty(device="cpu"), std)
        torch.set_rng_state(behind)
        reset_others(part)
        yield from _shown(name + prefix, part)


def _parts(model: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """The model's parts in the order of its modules, each with the prefix of its names."""
    for name, child in model.named_children():
        if child is model.blocks:
            yield from ((f"{name}.{i}.", block) for i, block in child.named_children())
        else:
            yield f"{name}.", child


def _shown(prefix: str, part: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A part's tensors by their names in the model, which are gone when they have been seen."""
    shown = {prefix + name: x for name, x in part.state_dict().items()}
    yield shown
    shown.clear()
    part.to("meta")


def _skip(build: Callable[[], nn.Module]) -> None:
    """Spend the random numbers that building a module would."""
    with torch.device("meta"), _DrawForReal():
        build()


class _DrawForReal(TorchDispatchMode):
    """Random numbers of tensors without memory are drawn, one tensor at a time, and dropped."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if (
            torch.Tag.nondeterministic_seeded in func.tags
            and isinstance(made, Tensor)
            and made.is_meta
        ):
            real_args, real_kwargs = tree_map_only(Tensor, _real, (args, kwargs))
            if "device" in real_kwargs:
                real_kwargs["device"] = torch.device("cpu")
            func(*real_args, **real_kwargs)
        return made


def _real(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu") if x.is_meta else x
