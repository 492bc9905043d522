"""Token mixers: parts that move information along the sequence.

Each is one file with a configuration (``kind`` is its tag) and a module; ``base`` says what they
have in common.
"""

from transnormer.nn.token_mixers.base import TokenMixer, TokenMixerBase
from transnormer.nn.token_mixers.lightning import Lightning, LightningConfig

# The union of all mixers' configurations; ``kind`` tells them apart.
TokenMixerConfig = LightningConfig

__all__ = ["Lightning", "LightningConfig", "TokenMixer", "TokenMixerBase", "TokenMixerConfig"]
