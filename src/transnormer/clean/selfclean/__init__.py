"""The self-cleaning loop: a model of the corpus scores the corpus, outliers go, again."""
