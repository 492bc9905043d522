"""The model class that vLLM builds: a decoder of this package with vLLM's layers and states."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.utils import maybe_prefix

from transnormer.integrations.vllm.core import STATE_DTYPE
from transnormer.integrations.vllm.layers import Layers
from transnormer.integrations.vllm.support import check_supported, state_shape
from transnormer.models.convert import released
from transnormer.models.decoder import Decoder


class TransnormerForVllm(nn.Module, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching):
    """TransNormerLLM for vLLM: continuous batches, chunked prefill, cached prefixes, shared heads.

    Arithmetic, state and positions are ``Decoder``'s; vLLM schedules, samples and keeps the states.
    Directories of the released layout and of ``transnormer convert --to hf`` are read.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.decoder_config()
        check_supported(config, vllm_config.parallel_config.tensor_parallel_size)
        with torch.device("meta"):
            self.decoder = Decoder(config)
        layers = Layers(
            self.decoder,
            maybe_prefix(prefix, "decoder"),
            vllm_config.quant_config,
            vllm_config.compilation_config.static_forward_context,
            # vLLM builds models under their device and dtype.
            torch.empty(0).device,
        )
        layers.replace()
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        """float32, whatever the model's dtype is."""
        return (STATE_DTYPE,)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """The shape of a sequence's state in one layer, on each rank."""
        config = vllm_config.model_config.hf_config.decoder_config()
        ranks = vllm_config.parallel_config.tensor_parallel_size
        check_supported(config, ranks)
        shape = state_shape(config, 0, ranks)
        return ((shape.heads, shape.head_dim, shape.head_dim),)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How a state is copied to and from cached prefixes: whole."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings, [tokens] -> [tokens, model_dim], before scaling."""
        return self.decoder.embedding(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states that the head reads, [tokens, model_dim]; tokens of all sequences in a row.

        Args:
            input_ids: [tokens].
            positions: int64 [tokens], of each token in its own sequence.
            intermediate_tensors: of pipeline stages, which there are none of.
            inputs_embeds: [tokens, model_dim] instead of those of input_ids.
        """
        hidden, _ = self.decoder.hidden(
            input_ids[None],
            positions=positions[None],
            keep_state=False,
            embeddings=None if inputs_embeds is None else inputs_embeds[None],
        )
        return hidden[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits, [rows, model_dim] -> [rows, vocab_size], on the ranks that sample."""
        return self.logits_processor(self.decoder.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their names in files, of either layout; returns the names here.

        Raises:
            ValueError: a tensor that the model does not have.
        """
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            ours = released.ours(name) or name
            if ours == released.HEAD and self.decoder.config.tie_embeddings:
                # Tied: the embedding holds it.
                continue
            key = f"decoder.{ours}"
            if key not in parameters:
                raise ValueError(
                    f"the weights hold {name}; expected only tensors of the model that config.json "
                    "describes"
                )
            load = getattr(parameters[key], "weight_loader", default_weight_loader)
            load(parameters[key], tensor)
            loaded.add(key)
        return loaded
