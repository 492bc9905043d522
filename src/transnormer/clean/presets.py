"""Published sets of whole-document rules as numbers, and ours.

`gopher`: Rae et al. 2021, arXiv:2112.11446, tables A1 and A2. `c4`: Raffel et al. 2020,
arXiv:1910.10683, section 2.2, its line rules as limits on the document. `fineweb`: Penedo et al.
2024, arXiv:2406.17557, section 3: Gopher's repetition and quality rules without the terminal
punctuation rule of C4, and three rules of its own. `paper`: TransNormerLLM's paper names its rules
and gives no number, so that these are ours; docs/cleaning.md says how they were set. The three
others were made for web pages in English: on manuals, verse or Chinese they drop good text.
"""

from typing import Any

_GOPHER: dict[str, Any] = {
    "min_words": 50,
    "max_words": 100_000,
    "min_mean_word_length": 3.0,
    "max_mean_word_length": 10.0,
    "max_symbols": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "min_alphabetic_words": 0.8,
    "min_stop_words": 2,
    "max_duplicate_lines": 0.3,
    "max_duplicate_paragraphs": 0.3,
    "max_duplicate_line_chars": 0.2,
    "max_duplicate_paragraph_chars": 0.2,
    "max_top_ngram_chars": (0.20, 0.18, 0.16),
    "max_duplicate_ngram_chars": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "min_words": 25,
        "max_duplicate_lines": 0.8,
        "max_duplicate_line_chars": 0.75,
        "max_duplicate_paragraph_chars": 0.75,
        "min_letters": 0.55,
        "max_unplausible_words": 0.2,
        "min_distinct_words": 0.23,
        "max_template_lines": 0.6,
        "max_url_share": 0.5,
        "max_garbled": 20.0,
    },
    "gopher": _GOPHER,
    "c4": {
        "min_sentences": 5,
        "min_terminal_lines": 0.5,
        "max_word_chars": 1000,
        "forbid": ("lorem ipsum", "javascript", "{"),
    },
    "fineweb": {
        **_GOPHER,
        "min_terminal_lines": 0.12,
        "max_short_lines": 0.67,
        "max_newlines_per_word": 0.3,
        "max_duplicate_line_chars": 0.01,
    },
}
