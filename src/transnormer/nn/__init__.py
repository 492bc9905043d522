"""Modules made of ops: norms, positions, token mixers and channel mixers."""
