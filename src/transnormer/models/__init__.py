"""The generic decoder, published sizes, and checkpoints."""
