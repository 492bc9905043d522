"""A micro-batch's forward and backward pass as a CUDA graph: captured once, then replayed.

A step launches some two thousand kernels, and between two short ones the device waits for the host.
A replayed graph is one launch. The guard, clipping and the optimizer stay outside, a few launches:
the guard may still drop an update.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transnormer.train.objectives.base import to_device

# Calls before a capture: they compile, choose kernels and fill caches, which a capture cannot.
_WARM_UPS = 2

Replay = Callable[[], object]
# Records what a call does on the device, without doing it; returns what does it, and the result of
# the call, which every replay fills anew.
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


def cuda_capture() -> Capture:
    """CUDA graphs that share their memory; they must run in the order of their captures."""
    pool = torch.cuda.graph_pool_handle()

    def capture(call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = call()
        return graph.replay, result

    return capture


class GraphedBackward:
    """A ``Backward`` that is captured when it has run a few times, and replayed from then on.

    There are two graphs: of a step's first micro-batch, which makes the gradients, and of the
    others, which add to them. Gradients lie at the same place in every step. Numbers are those of
    plain calls: the same kernels run.
    """

    def __init__(
        self,
        backward: Callable[[Any, Any, Any], Tensor],
        model: nn.Module,
        device: torch.device,
        capture: Capture,
    ) -> None:
        """Nothing runs yet.

        Args:
            backward: (model, batch on the device, divisor, a float or a float32 [] tensor on the
                device) -> summed loss; adds the gradient of it over the divisor.
            model: whose parameters get gradients; without dropout.
            device: where it is.
            capture: see ``cuda_capture``.
        """
        self._backward, self._device, self._capture = backward, device, capture
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._divisor = torch.ones((), dtype=torch.float32, device=device)
        self._calls = 0
        self._batch: Any = None
        self._grads: list[Tensor | None] = []
        self._first: tuple[Replay, Tensor] | None = None
        self._further: tuple[Replay, Tensor] | None = None

    def __call__(self, model: Any, batch: Any, divisor: float) -> Tensor:
        """As ``Backward``; ValueError for a batch of another shape than the captured one."""
        begins = all(p.grad is None for p in self._parameters)
        self._calls += 1
        if self._calls <= _WARM_UPS or (self._first is None and not begins):
            return self._backward(model, to_device(batch, self._device), divisor)
        self._fill(batch)
        self._divisor.fill_(divisor)

        def call() -> Tensor:
            return self._backward(model, self._batch, self._divisor)

        if begins:
            if self._first is None:
                self._first = self._capture(call)
                self._grads = [p.grad for p in self._parameters]
            self._first[0]()
            for parameter, grad in zip(self._parameters, self._grads, strict=True):
                parameter.grad = grad
            return self._first[1]
        if self._further is None:
            self._further = self._capture(call)
        self._further[0]()
        return self._further[1]

    def _fill(self, batch: Any) -> None:
        """Copy a batch to where the graphs read."""
        if self._batch is None:
            self._batch = to_device(batch, self._device)
            return
        for kept, part in zip(self._batch, batch, strict=True):
            if kept is None and part is None:
                continue
            if kept is None or part is None or kept.shape != part.shape:
                shapes = [None if x is None else list(x.shape) for x in (part, kept)]
                raise ValueError(
                    f"a batch has a tensor of shape {shapes[0]}; expected {shapes[1]}, as the "
                    "captured one had; set train.cuda_graph to false"
                )
            kept.copy_(part, non_blocking=True)


def check_graphed(model: nn.Module, device: torch.device) -> None:
    """Raise where ``train.cuda_graph`` cannot be: RuntimeError without a GPU, ValueError for dropout."""
    if device.type != "cuda":
        raise RuntimeError(
            f"train.cuda_graph is true on the device {device.type!r}; expected a GPU: there is "
            "nothing to capture elsewhere; leave it out"
        )
    drops = getattr(model.config, "dropout", 0.0)
    if drops:
        raise ValueError(
            f"model.dropout is {drops} with train.cuda_graph; expected 0: a captured pass would not "
            "be asked for its random state; set one of the two"
        )
