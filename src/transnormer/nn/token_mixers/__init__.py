"""Token mixers: parts that move information along the sequence.

Each takes ``forward(x, *, positions, cu_seqlens, mask, state, shape, shared) -> (y, state)``.
"""

from transnormer.nn.token_mixers.lightning import Lightning, LightningConfig

# The union of all mixers' configurations; ``kind`` tells them apart. One member so far.
TokenMixerConfig = LightningConfig
TokenMixer = Lightning

__all__ = ["Lightning", "LightningConfig", "TokenMixer", "TokenMixerConfig"]
