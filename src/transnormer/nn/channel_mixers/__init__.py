"""Channel mixers: parts that act on each token alone, [..., model_dim] -> [..., model_dim]."""

from typing import Annotated

from pydantic import Field

from transnormer.nn.channel_mixers.ffn import Ffn, FfnConfig
from transnormer.nn.channel_mixers.glu import Glu, GluConfig

ChannelMixerConfig = Annotated[GluConfig | FfnConfig, Field(discriminator="kind")]

__all__ = ["ChannelMixerConfig", "Ffn", "FfnConfig", "Glu", "GluConfig"]
