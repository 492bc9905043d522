"""A decoder's layers as vLLM's: projections that it shares among ranks and may quantise.

The decoder is built without memory and its projections are replaced, so that no rank ever holds all
of a layer; what a forward pass computes is said by the decoder alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from transnormer.integrations.vllm.core import CachedCore, CachedState
from transnormer.integrations.vllm.support import state_shape
from transnormer.models.decoder import Block, Decoder
from transnormer.nn.channel_mixers import Ffn, Glu
from transnormer.nn.norms import Norm
from transnormer.ops.checks import accumulation_dtype


class SharedNorm(nn.Module):
    """SRMSNorm or RMSNorm over channels that lie on several ranks: x / sqrt(mean(x^2) + eps).

    The sums of squares are added over the ranks in float32, and the norm is the one of all
    channels, not one a rank. Source: Qin et al. 2023, arXiv:2307.14995, section 3.1.
    """

    def __init__(self, norm: Norm, device: torch.device) -> None:
        super().__init__()
        self.dim, self.eps = norm.dim, norm.config.eps
        self.weight = None if norm.weight is None else shared_by_rows(norm.weight, device)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, [..., this rank's channels]; the result has x's dtype."""
        y = x.to(accumulation_dtype(x.dtype))
        squares = tensor_model_parallel_all_reduce(y.square().sum(-1, keepdim=True))
        y = y * torch.rsqrt(squares / self.dim + self.eps)
        return (y if self.weight is None else y * self.weight.to(y.dtype)).to(x.dtype)


def shared_by_rows(x: Tensor, device: torch.device) -> nn.Parameter:
    """This rank's rows of a parameter, not yet loaded; loading takes them out of the whole."""
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    rows = x.shape[0] // ranks

    def load(parameter: Tensor, whole: Tensor) -> None:
        parameter.data.copy_(whole[rank * rows : (rank + 1) * rows])

    empty = torch.empty(rows, *x.shape[1:], dtype=x.dtype, device=device)
    parameter: Any = nn.Parameter(empty, requires_grad=False)
    # vLLM looks for it there.
    parameter.weight_loader = load
    return parameter


class Layers:
    """Replaces the parts of a decoder on the meta device by vLLM's.

    Args:
        decoder: checked by ``check_supported``; changed in place.
        prefix: of the names that vLLM knows the layers by.
        quantization: vLLM's scheme, or None.
        states: vLLM's table of the layers that have states.
        device: where the weights go.
    """

    def __init__(
        self,
        decoder: Decoder,
        prefix: str,
        quantization: Any,
        states: dict[str, Any],
        device: torch.device,
    ) -> None:
        self._decoder, self._prefix, self._device = decoder, prefix, device
        self._quantization, self._states = quantization, states
        self._ranks = get_tensor_model_parallel_world_size()

    def replace(self) -> None:
        """Replace everything, and give what stays its memory and its computed values."""
        decoder: Any = self._decoder
        config = decoder.config
        sizes = (config.vocab_size, config.model_dim)
        embedding = VocabParallelEmbedding(*sizes, prefix=f"{self._prefix}.embedding")
        decoder.embedding = embedding
        head = ParallelLMHead(
            *sizes, quant_config=self._quantization, prefix=f"{self._prefix}.lm_head"
        )
        decoder.lm_head = head.tie_weights(embedding) if config.tie_embeddings else head
        for index, block in enumerate(decoder.blocks):
            self._replace_block(index, block)
        _materialise(decoder, self._device)
        for block in decoder.blocks:
            decay = block.token_mixer.decay
            own = decay.log_decay.chunk(self._ranks)[get_tensor_model_parallel_rank()]
            decay.log_decay = own.clone()

    def _replace_block(self, index: int, block: Block) -> None:
        mixer: Any = block.token_mixer
        where = f"blocks.{index}.token_mixer"
        # Rows of q, k, v and the gate, each shared among the ranks.
        fused = mixer.qkvu_proj
        parts = 4 if mixer.config.gate == "full" else 3
        mixer.qkvu_proj = MergedColumnParallelLinear(
            fused.in_features,
            [fused.out_features // parts] * parts,
            bias=fused.bias is not None,
            **self._options(f"{where}.qkvu_proj"),
        )
        if mixer.config.gate == "low_rank":
            self._linear(mixer, where, "gate_down_proj", ReplicatedLinear)
            self._linear(mixer, where, "gate_up_proj", ColumnParallelLinear)
        self._linear(mixer, where, "out_proj", RowParallelLinear)
        if mixer.lrpe is not None:
            mixer.lrpe.theta = shared_by_rows(mixer.lrpe.theta, self._device)
        if self._ranks > 1:
            mixer.norm = SharedNorm(mixer.norm, self._device)
        shape = state_shape(self._decoder.config, index, self._ranks)
        names = ("state",) if shape.parts == 1 else ("state_cos", "state_sin")
        states = [
            CachedState(f"{self._prefix}.{where}.{name}", shape, self._states) for name in names
        ]
        mixer.core = CachedCore(mixer.core, states)
        channel, where = block.channel_mixer, f"blocks.{index}.channel_mixer"
        if isinstance(channel, Glu):
            self._linear(channel, where, "gate_proj", ColumnParallelLinear)
        if isinstance(channel, Glu | Ffn):
            self._linear(channel, where, "up_proj", ColumnParallelLinear)
            self._linear(channel, where, "down_proj", RowParallelLinear)

    def _linear(self, module: nn.Module, where: str, name: str, kind: Any) -> None:
        linear: Any = getattr(module, name)
        size, bias = (linear.in_features, linear.out_features), linear.bias is not None
        setattr(module, name, kind(*size, bias=bias, **self._options(f"{where}.{name}")))

    def _options(self, name: str) -> dict[str, Any]:
        prefix = f"{self._prefix}.{name}"
        return {"quant_config": self._quantization, "prefix": prefix, "return_bias": False}


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Give tensors on the meta device memory, and buffers the values that they are computed to."""
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not any(x.is_meta for x in own):
            continue
        module.to_empty(device=device, recurse=False)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if list(module.buffers(recurse=False)):
            reset: Any = module.reset_parameters
            reset()
