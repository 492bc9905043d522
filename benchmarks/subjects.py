"""Who is compared: this package and its peers behind one signature, each in its own layout.

A subject is imported when it is loaded, never before: one that is missing or broken costs its own
column, not the run.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transnormer.ops import linear_attention

# call(q, k, v, log_decay, initial_state=, final_state=, cu_seqlens=) -> (o, final state or None)
Call = Callable[..., tuple[Tensor, Tensor | None]]


class Subject(NamedTuple):
    """One implementation.

    Attributes:
        name: its key in results.
        load: returns the call; raises ImportError where the package is missing.
        seq_dim: where seq stands in its layout: 1 in [batch, seq, heads, dim], 2 in
            [batch, heads, seq, dim].
        linear: whether it computes linear attention with decay (softmax does not).
    """

    name: str
    load: Callable[[], Call]
    seq_dim: int = 1
    linear: bool = True


def ours(implementation: str) -> Subject:
    """This package's op under a named implementation."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None = None,
        final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            implementation=implementation,
        )

    return Subject("ours", lambda: call)


def _fla(function: str) -> Callable[[], Call]:
    def load() -> Call:
        run: Any = getattr(import_module("fla.ops.simple_gla"), function)

        def call(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            log_decay: Tensor | None,
            initial_state: Tensor | None = None,
            final_state: bool = False,
            cu_seqlens: Tensor | None = None,
        ) -> tuple[Tensor, Tensor | None]:
            return run(
                q,
                k,
                v,
                g_gamma=log_decay,
                scale=1.0,
                initial_state=initial_state,
                output_final_state=final_state,
                cu_seqlens=cu_seqlens,
            )

        return call

    return load


def _opennlplab() -> Call:
    run: Any = import_module("lightning_attn.ops").lightning_attn_func

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None = None,
        final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if initial_state is not None:
            raise NotImplementedError("the package takes no initial state")
        if cu_seqlens is not None:
            raise NotImplementedError("the package takes no packed sequences")
        slopes = None if log_decay is None else -log_decay.view(-1, 1, 1)
        return run(q, k, v, slopes), None

    return call


def _softmax(backend: str | None) -> Callable[[], Call]:
    def load() -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = None if backend is None else getattr(SDPBackend, backend)

        def call(
            q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            if chosen is None:
                return scaled_dot_product_attention(q, k, v, is_causal=True), None
            with sdpa_kernel(chosen):
                return scaled_dot_product_attention(q, k, v, is_causal=True), None

        return call

    return load


FLA_CHUNK = Subject("fla_chunk", _fla("chunk_simple_gla"))
FLA_FUSED = Subject("fla_fused_chunk", _fla("fused_chunk_simple_gla"))
OPENNLPLAB = Subject("opennlplab", _opennlplab, seq_dim=2)
SOFTMAX_FA2 = Subject("softmax_fa2", _softmax("FLASH_ATTENTION"), 2, False)
SOFTMAX_CUDNN = Subject("softmax_cudnn", _softmax("CUDNN_ATTENTION"), 2, False)
# The one that runs on a CPU, for dry runs.
SOFTMAX_ANY = Subject("softmax_any", _softmax(None), 2, False)

LINEAR_PEERS = (FLA_CHUNK, FLA_FUSED, OPENNLPLAB)
SOFTMAX_PEERS = (SOFTMAX_FA2, SOFTMAX_CUDNN)


def error_text(error: BaseException) -> str:
    """One short line about an exception."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines)[:300]}"


def is_lost(error: Exception) -> bool:
    """Whether the device is unusable for the rest of the process after this exception."""
    text = str(error)
    return isinstance(error, torch.AcceleratorError) or "illegal memory access" in text
