"""Signatures of other packages over ``transnormer.ops``: change an import, keep the code."""

from transnormer.compat import fla, opennlplab

__all__ = ["fla", "opennlplab"]
