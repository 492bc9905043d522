"""Published sizes as functions, each with its source; named ``family-size`` on the command line."""

import difflib

from transnormer.models.decoder import DecoderConfig
from transnormer.models.zoo.ablations import ABLATIONS, ablation
from transnormer.models.zoo.tnl import SIZES as _TNL_SIZES
from transnormer.models.zoo.tnl import tnl, tnl_custom

__all__ = ["ABLATIONS", "ablation", "get", "names", "tnl", "tnl_custom"]

_FAMILIES = {"tnl": (tnl, _TNL_SIZES)}


def names() -> list[str]:
    """Every name that ``get`` takes."""
    return [f"{family}-{size}" for family, (_, sizes) in _FAMILIES.items() for size in sizes]


def get(name: str, *, vocab_size: int | None = None) -> DecoderConfig:
    """The configuration behind a name such as ``tnl-385m``; vocab_size None is the published one.

    Raises:
        ValueError: an unknown name.
    """
    family, _, size = name.partition("-")
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "transnormer info lists them"
        raise ValueError(f"model name is {name!r}; expected one of {', '.join(names())}; {hint}")
    build, _ = _FAMILIES[family]
    return build(size) if vocab_size is None else build(size, vocab_size=vocab_size)
