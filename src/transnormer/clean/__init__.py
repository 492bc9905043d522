"""Corpus cleaning: rules, deduplication and reports, run as datatrove pipelines."""
