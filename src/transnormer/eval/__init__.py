"""Scoring of models; it knows nothing of training, which is handed an evaluation as a function."""
