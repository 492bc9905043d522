"""What a rank holds of a tensor that lies on several."""

from typing import Any

from torch import Tensor


def own_share(x: Any) -> Tensor:
    """This rank's share of a tensor that lies on several ranks; any other as it is."""
    return x.to_local() if hasattr(x, "to_local") else x
