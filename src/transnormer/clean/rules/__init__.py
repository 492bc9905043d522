"""The rules: each a function of a text, free of datatrove and of files."""
