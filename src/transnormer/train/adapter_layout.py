"""Adapters on several processes: checkpoints of merged weights, as one process writes them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from transnormer.optim import Optimizer
from transnormer.parallel.host_copies import HostCopies
from transnormer.parallel.layout import Layout
from transnormer.parallel.staged import StagedShares
from transnormer.parallel.state_dict import gather_whole
from transnormer.parallel.tensor_layers import local
from transnormer.train.adapters import added, is_adapter, like, merged, write_adapter

ModelT = TypeVar("ModelT", bound=nn.Module)


class AdapterLayout(Layout):
    """A ``Layout`` of a decoder with adapters.

    Frozen weights and adapters are shared out alike, and gradients of adapters alone are summed. Each
    rank merges its own rows of a weight: rows of B and all of A, which is small, make them.
    """

    def wrap(self, model: ModelT, values: Iterable[Mapping[str, Tensor]] | None = None) -> ModelT:
        """Lay a decoder with adapters out; see ``Layout.wrap``."""
        plain, wrapped = type(model), super().wrap(model, values)
        self._plain = lambda config: like(wrapped, plain(config))
        return wrapped

    def _exported(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The merged weights."""
        return merged(model, model.state_dict(), _added_rows)

    def stage(
        self, model: nn.Module, optimizer: Optimizer, copies: HostCopies | None
    ) -> StagedShares:
        """Take this rank's shares of merged weights and optimizer state, and the whole adapters."""
        held = self._held(model, optimizer)
        staged = _StagedAdapters(model, held, self._saving, copies)
        own = {name: x for name, x in model.state_dict().items() if is_adapter(name)}
        staged.adapters = gather_whole(own)
        return staged


class _StagedAdapters(StagedShares):
    """Shares of the merged model, and the adapters, whole on the first process."""

    adapters: Mapping[str, Tensor]

    def write(self, folder: Path, *, tokenizer_fingerprint: str | None) -> None:
        """As ``StagedShares.write``, and peft's files."""
        super().write(folder, tokenizer_fingerprint=tokenizer_fingerprint)
        self.from_first(lambda: write_adapter(self._model, self.adapters, folder))


def _added_rows(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``adapters.added`` of this rank's rows."""
    total, whole = weight.clone(), _whole(a)
    local(total).copy_(added(local(weight), whole, local(b), scale))
    return total


def _whole(x: Any) -> Tensor:
    return x.full_tensor()
