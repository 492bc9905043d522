"""A decoder behind torchtitan's model protocol."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from transnormer.models.cost import ModelCost
from transnormer.models.decoder import Decoder, DecoderConfig
from transnormer.parallel.shares import fill_all, share_of


@dataclass
class DecoderArgs(BaseModelArgs):
    """A decoder's configuration in torchtitan's form.

    Attributes:
        decoder: ``DecoderConfig.model_dump(mode="json")``.
    """

    decoder: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> DecoderConfig:
        """The configuration."""
        return DecoderConfig.model_validate(self.decoder)

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Nothing depends on the job: a decoder reads sequences of any length."""

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and operations of a token's forward and backward pass, for MFU."""
        cost = ModelCost.of(self.config, torch.float32)
        parameters = sum(x.numel() for x in model.parameters())
        return parameters, round(3 * cost.flops((seq_len + 1) // 2).total)


class TitanDecoder(ModelProtocol):
    """A ``Decoder`` that gives logits alone, as torchtitan's losses want them.

    Attributes:
        decoder: the model.
        half: dtype of the autocast around it; None where the trainer brings its own, or none.
    """

    def __init__(self, model_args: DecoderArgs) -> None:
        """Build it; torchtitan does so on the meta device."""
        super().__init__(model_args)
        self.decoder = Decoder(model_args.config)
        self.half: torch.dtype | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [batch, seq] -> logits [batch, seq, vocab_size]."""
        if self.half is None:
            return self.decoder(tokens).logits
        with torch.autocast(tokens.device.type, dtype=self.half):
            return self.decoder(tokens).logits

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Give the parameters, shared out or not, the values of a new ``Decoder``.

        Every process draws the whole model on its host and keeps its share, so that the values do not
        depend on the layout; torchtitan has seeded all of them alike.
        """
        fresh = Decoder(self.decoder.config)
        stored = self.decoder.state_dict()
        fill_all({name: share_of(x) for name, x in stored.items()}, fresh.state_dict())
        computed = dict(fresh.named_buffers())
        for name, buffer in self.decoder.named_buffers():
            if name not in stored:
                buffer.copy_(computed[name])
