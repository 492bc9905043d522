"""What all token mixers have in common: the base of their configurations and of their modules."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transnormer.config import Config
from transnormer.nn.state import LayerState


class TokenMixerBase(Config):
    """Base of the mixers' configurations; each adds ``kind``, its tag in the union."""

    def build(
        self, model_dim: int, layer_index: int, num_layers: int, *, causal: bool
    ) -> "TokenMixer":
        """The module of layer ``layer_index`` (from 0) of ``num_layers``.

        Raises:
            ValueError: sizes that do not fit each other.
            NotImplementedError: causal=False and the mixer has no bidirectional form.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def build_shared(self, model_dim: int, num_layers: int) -> nn.Module | None:
        """What the layers of this kind share, built once by the decoder; None for nothing.

        Its ``forward()``, without arguments, runs once a forward pass of the model; every mixer of
        the kind gets the result as ``shared``.
        """
        return None


class TokenMixer(nn.Module, ABC):
    """Base of the modules that move information along the sequence.

    Attributes:
        may_drop_state: ``forward`` also takes keep_state; False where the caller has no use for the
            state and it would cost memory.
        steps_in_slots: ``forward`` also takes a ``SlotState``, and ``log_decay(dtype)`` is that of
            its steps: the mixer is one ``LinearAttentionCore`` with constant decay.
    """

    may_drop_state: ClassVar[bool] = False
    steps_in_slots: ClassVar[bool] = False

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        shape: tuple[int, ...] | None = None,
        shared: Any = None,
    ) -> tuple[Tensor, Any]:
        """Mix x along seq.

        Args:
            x: [batch, seq, model_dim].
            positions: int64 [batch, seq].
            cu_seqlens: bounds of packed sequences; batch is then 1.
            mask: bool [batch, seq]; a False token leaves no trace in the state, and its own output
                means nothing. x is finite there too: its weight is 0, and 0 times NaN is NaN.
            state: what an earlier call returned, rows [batch or num_sequences]; None at the start.
                Never modified.
            shape: extents of a multi-dimensional input, whose product is seq; None is a sequence. A
                mixer without axes reads a sequence in any case.
            shared: the result of the kind's shared part, see ``TokenMixerBase.build_shared``.

        Returns:
            y, [batch, seq, model_dim], and the state after the last token (None where the mixer is
            not causal).
        """

    def log_decay(self, dtype: torch.dtype) -> Tensor | None:
        """Constant log decays of the heads for activations of ``dtype``, [kv_heads], or None.

        Raises:
            NotImplementedError: a mixer without ``steps_in_slots``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no constant decay")

    @abstractmethod
    def mixing_flops(self, context: int) -> float:
        """Operations of one token's forward pass that are not those of ``nn.Linear``.

        Products of matrices and recurrences, 2 a multiply-add; norms, activations, gates and
        positions do not count: they are proportional to model_dim alone.

        Args:
            context: tokens that this one sees, itself included.
        """

    @abstractmethod
    def empty_state(
        self,
        rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LayerState:
        """The state of ``rows`` sequences before their first token; as good as None.

        Args:
            rows: sequences.
            dtype: of the activations (recurrent states are float32, float64 for float64).
            device: "meta" gives shapes without memory.
        """
