"""Sampling and generation: token ids and states in, token ids and states out."""
