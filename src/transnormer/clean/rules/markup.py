"""Parts of a text that edits of words and signs must leave alone: code, formulas, Markdown.

`shelter` takes them out and leaves one noncharacter for each; `restore` puts them back byte for
byte. Every pattern is bounded, so that the time is linear in the text whatever it holds.
"""

import re
from collections.abc import Callable

# A noncharacter of Unicode: never in text that is meant to be read, and removed on entry.
MARK = "\ufdd0"

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_FENCES = ("```", "~~~")
_CODE_SIGNS = frozenset("`~ \t")
# Section underlines, rulers, and the borders of tables.
_RULER = re.compile(r"[ \t]*[-=*_~#^+\"'`.:|<>]{3,}(?:[ \t]+[-=*_~#^+\"'`.:|]{2,})*[ \t]*\Z")
_DEFINITION = re.compile(r"[ \t]*(?:\[[^\]\n]{1,200}\]:|\.\. |__ )\S?")
_LINK = r"\[[^\]\n]{0,300}\](?:\([^)\s]{1,2000}(?: [^)\n]{1,200})?\)|\[[^\]\n]{0,200}\])"
# What a line of the two kinds above begins with: most lines cost one look-up.
_HEADS = frozenset(" \t-=*_~#^+\"'`.:|<>[")
# Every alternative begins with a sign of its own: the search then leaps from one to the next.
_INLINE = re.compile(
    r"`(?<!``)(`{0,2})(?!`)[^`\n]{1,500}`\1(?!`)"
    r"|\$\$[^$]{1,2000}\$\$"
    r"|\$(?![\s\d$])[^$\n]{0,300}(?<![\s\\])\$(?!\d)"
    r"|\$\d[^$\n]{0,300}[\\^_{}=][^$\n]{0,300}(?<![\s\\])\$(?!\d)"
    r"|\\\([^\n]{1,500}?\\\)"
    r"|\\\[[^\[\]]{1,2000}?\\\]"
    r"|\\begin\{(\w{1,30}\*?)\}[\s\S]{1,5000}?\\end\{\2\}"
    rf"|!{_LINK}|{_LINK}"
    r"|<(?:https?|ftp|mailto):[^>\s]{1,2000}>"
)
_INLINE_SIGNS = ("`", "$", "\\(", "\\[", "\\begin", "](", "][", "<http", "<ftp", "<mailto")


def shelter(text: str) -> tuple[str, list[str]]:
    """Take code, formulas, links and rulers out of a text.

    Returns the text with one MARK for each, and what the marks stand for, in order.
    """
    kept: list[str] = []

    def take(match: re.Match[str]) -> str:
        # What lies within a sheltered line is sheltered already.
        kept.append(match[0])
        return MARK

    lines = _shelter_lines(text.replace(MARK, ""))
    if not any(sign in text for sign in _INLINE_SIGNS):
        inline: Callable[[str], str] = str
    else:

        def inline(piece: str) -> str:
            return _INLINE.sub(take, piece)

    out: list[str] = []
    for sheltered, piece in lines:
        if sheltered:
            kept.append(piece)
            out.append(MARK)
        else:
            out.append(inline(piece))
    return "".join(out), kept


def restore(text: str, kept: list[str]) -> str:
    """Put back what `shelter` took out."""
    pieces = text.split(MARK)
    if len(pieces) != len(kept) + 1:
        raise RuntimeError(
            f"{len(pieces) - 1} marks are left of {len(kept)}; expected all; an edit removed one"
        )
    out = [pieces[0]]
    for piece, after in zip(kept, pieces[1:], strict=True):
        out += [piece, after]
    return "".join(out)


def code_lines(lines: list[str]) -> list[bool]:
    """For each line whether it is code: fenced, or indented by four after a blank line.

    A fence that is not closed opens nothing: it is the end of a block whose head was cut off.
    """
    if _CODE_SIGNS.isdisjoint({line[:1] for line in lines}):
        return [False] * len(lines)
    flags: list[bool] = []
    start = 0
    while start < len(lines):
        end = _fenced(lines, start)
        if end is None:
            end = next(
                (n for n in range(start + 1, len(lines)) if lines[n].lstrip(" ")[:3] in _FENCES),
                len(lines),
            )
            flags += _indented(lines[start:end], blank=start == 0 or not lines[start - 1].strip())
        else:
            flags += [True] * (end - start)
        start = end
    return flags


def _fenced(lines: list[str], start: int) -> int | None:
    """Where the fenced block that begins at a line ends; None where none begins."""
    found = _FENCE.match(lines[start])
    if not found or found[1][0] in lines[start][found.end() :]:
        return None
    for number in range(start + 1, len(lines)):
        line = lines[number]
        if line.lstrip(" ")[:3] not in _FENCES:
            continue
        closing = _FENCE.match(line)
        if closing and closing[1].startswith(found[1]) and not line[closing.end() :].strip():
            return number + 1
    return None


def _indented(lines: list[str], *, blank: bool) -> list[bool]:
    flags: list[bool] = []
    code = blank
    # Blank lines between two lines of code are of it.
    last = -1
    for line in lines:
        if "!" <= line[:1] <= "~":
            # Most lines: neither empty nor indented.
            flags.append(False)
            code = blank = False
            continue
        empty = not line.strip()
        inside = (line[:4] == "    " or line[:1] == "\t") and not empty and (blank or code)
        if inside and code and 0 <= last < len(flags):
            flags[last:] = [True] * (len(flags) - last)
        flags.append(inside)
        last = len(flags) if inside else last
        if not empty:
            code = inside
        blank = empty
    return flags


def _shelter_lines(text: str) -> list[tuple[bool, str]]:
    """Cut a text into runs of lines that are sheltered whole and runs that are not."""
    lines = text.splitlines(keepends=True)
    flags = [
        code or (line[0] in _HEADS and _stands_alone(line))
        for line, code in zip(lines, code_lines(lines), strict=True)
    ]
    runs: list[tuple[bool, str]] = []
    start = 0
    while start < len(lines):
        try:
            end = flags.index(not flags[start], start)
        except ValueError:
            end = len(lines)
        runs.append((flags[start], "".join(lines[start:end])))
        start = end
    return runs


def _stands_alone(line: str) -> bool:
    if line.lstrip(" \t")[:1] not in _HEADS:
        return False
    content = line.rstrip("\n")
    return bool(_RULER.match(content)) or bool(_DEFINITION.match(content))
