"""The sizes that the scaling laws of linear attention share."""

from typing import NamedTuple


class ScalingSize(NamedTuple):
    """One row of the table of sizes; head dim is 128."""

    num_layers: int
    model_dim: int
    heads: int
    glu_dim: int


# Shen et al. 2024, arXiv:2406.16690, tables 2 and 7, for TNL and cosFormer2; the other two have 26
# layers at 410m. The paper prints 16 heads and a GLU width of 5632 for 1b, which give neither its
# head dim nor its parameters; 12 and 4096 do. Table 2 has 8 heads for 70m and 160m.
SCALING_SIZES = {
    "70m": ScalingSize(6, 512, 4, 1536),
    "160m": ScalingSize(12, 768, 6, 2048),
    "410m": ScalingSize(25, 1024, 8, 2816),
    "1b": ScalingSize(32, 1536, 12, 4096),
    "3b": ScalingSize(35, 2560, 20, 6912),
    "7b": ScalingSize(32, 4096, 32, 11_008),
}
SCALING_VOCAB_SIZE = 100_280


def scaling_size(size: str, *, deeper: bool = False) -> ScalingSize:
    """The row of a size; ``deeper`` is that of LLaMA and HGRN2.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SCALING_SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SCALING_SIZES)}")
    row = SCALING_SIZES[size]
    return row._replace(num_layers=26) if deeper and size == "410m" else row
