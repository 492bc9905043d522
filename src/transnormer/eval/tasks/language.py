"""How well a model predicts text: the last words of LAMBADA, the articles of WikiText."""

import re
from pathlib import Path

from transnormer.data.documents import read_documents
from transnormer.eval.tasks.items import Ending, Items, Page, Task
from transnormer.eval.tasks.records import records

# A heading of the first level alone: " = Title = ".
_TITLE = re.compile(r"^ = (?!=)[^\n]*(?<!=) = $", re.MULTILINE)
# (pattern, replacement) in the order in which lm-evaluation-harness's wikitext undoes the tokens of
# the data set; they are its facts, errors included.
_PLAIN = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_PAIRS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenized(page: str) -> str:
    """An article of WikiText as running text, as lm-evaluation-harness's ``wikitext`` makes it."""
    for old, new in _PLAIN:
        page = page.replace(old, new)
    for pattern, new in _PAIRS:
        page = re.sub(pattern, new, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page


def articles(text: str) -> list[str]:
    """A WikiText file cut before each title; what stands before the first belongs to it."""
    starts = [match.start() for match in _TITLE.finditer(text)]
    bounds = [0, *starts[1:], len(text)] if starts else [0, len(text)]
    pages = [text[a:b] for a, b in zip(bounds, bounds[1:])]
    return [page for page in pages if page.strip()]


def _wikitext(path: Path) -> Items:
    texts = [document.text for document in read_documents(str(path), name="--data")]
    return Items([Page(detokenized(page), page) for text in texts for page in articles(text)])


def _lambada(path: Path) -> Items:
    return Items(
        [Ending(line.text("context"), " " + line.text("continuation")) for line in records(path)]
    )


TASKS = (
    Task(
        "lambada_openai",
        "the last word of a passage",
        ("lambada_openai.jsonl", "lambada.jsonl"),
        _lambada,
    ),
    Task(
        "wikitext",
        "articles, perplexity by word and byte",
        ("wikitext2_test.raw.txt", "wikitext.txt"),
        _wikitext,
    ),
)
