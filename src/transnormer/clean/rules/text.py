"""Edits of signs: encoding, control characters, addresses and tags, punctuation, numbers.

Each function returns the text and how often it changed it. The first four of the paper's six rules
(Qin et al. 2023, arXiv:2307.14995, appendix: URLs and tags, garbled text, repeated punctuation,
special characters) and its fifth (numbers) are here; the sixth, that Markdown and LaTeX stay, is
`rules.markup`. The paper gives no patterns; these are ours.
"""

import html
import re
import unicodedata

import ftfy
import numpy as np
from ftfy.badness import badness, is_bad

from transnormer.clean.rules.markup import MARK, restore, shelter
from transnormer.clean.words import code_points

# Controls but tab and line feed; zero-width and direction signs, soft hyphens, specials,
# noncharacters and lone surrogates.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f"
    "\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\uffff\ufdd0-\ufdef\ud800-\udfff\U000e0001-\U000e007f]"
)
_ASCII_CONTROLS = bytes((*range(9), 11, 12, *range(14, 32), 127))
# Joiners have a meaning in Arabic, Indic and emoji; between Latin letters or Han they have none.
_JOINERS = re.compile(
    "(?<=[\x00-\u024f\u2e80-\u9fff])[\u200c\u200d]+|[\u200c\u200d]+(?=[\x00-\u024f\u2e80-\u9fff])"
)
_SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# Any of the two above: one look at a text that holds none of them, which is most.
_ODD = re.compile(_CONTROLS.pattern[:-1] + _SPACES.pattern[1:])
_FULL_WIDTH = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B))}
_FULL_WIDTH |= {code: code - 0xFEE0 for code in range(0xFF41, 0xFF5B)}
_HAS_FULL_WIDTH = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]")
# Every alternative begins with a letter of its own: the search then leaps from one to the next.
_URL = re.compile(
    r"(?:https?://|ftp://|w(?<=\bw)ww\d?\.(?=[\w-]+\.\w))"
    rf"[^\s<>\"'“”‘’{MARK}\u3000-\u9fff\uff00-\uffef]{{1,4000}}"
)
_URL_TAIL = re.compile(r"[.,;:!?)\]}*_]+\Z")
_TAGS = (
    "a|abbr|address|article|aside|b|blockquote|body|br|button|caption|center|cite|code|col|"
    "colgroup|dd|del|details|div|dl|dt|em|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|"
    "html|i|iframe|img|input|ins|kbd|label|li|link|main|mark|meta|nav|ol|option|p|picture|pre|q|s|"
    "samp|section|select|small|source|span|strike|strong|style|sub|summary|sup|table|tbody|td|"
    "textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr"
)
_TAG = re.compile(
    rf"</?(?:{_TAGS})(?:\s[^<>{MARK}]{{0,2000}})?/?>|<!--[^{MARK}]{{0,5000}}?-->", re.IGNORECASE
)
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|[lr][sd]quo|[nm]dash|hellip|#\d{1,6}|#x[\da-f]{1,5});"
)
# Three dots are an ellipsis; of other signs three in a row are two too many.
_REPEATED = re.compile(r"([,;!?:，。！？；：、…])\1{2,}")
_DOTS = re.compile(r"\.{4,}")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]|\.\d{3}\b)")
_SPACED = re.compile(r"(?<![\d.,] )(?<![\d.,])\d{1,3}(?:[ \u2009]\d{3}){2,}(?![\d,]| \d)")
_HAS_GROUPS = re.compile(r",\d\d\d")
_HAS_SPACES = re.compile(r" \d\d\d[ \u2009]\d\d\d")
_ZERO_CENTS = re.compile(r"(?<![\d.,])(\d{3,})\.00(?![\d.,]\d|\d)")
# Characters that begin a wrongly decoded sequence of UTF-8, in the codes that it is decoded as.
_CODES = (
    "latin-1",
    "cp1252",
    "cp1250",
    "cp1251",
    "cp1253",
    "cp1254",
    "cp1257",
    "mac_roman",
    "cp437",
)
_LEADS = frozenset(bytes([b]).decode(c, "ignore") for b in range(0xC2, 0xF5) for c in _CODES)
# Such a character before another one, or a byte's second half at the head of a sequence.
_LEAD = re.compile("[" + "".join(map(re.escape, sorted(_LEADS))) + "][^\x00-\x7f]")
_TAIL = re.compile("[\x80-\xbf](?<![^\x00-\x7f].)[^\x00-\x7f]")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")


def suspect(text: str) -> bool:
    """Whether a text may hold UTF-8 that was decoded as another code; False is certain."""
    if text.isascii():
        return False
    return _LEAD.search(text) is not None or _TAIL.search(text) is not None


def is_garbled(text: str) -> bool:
    """Whether a text holds a sequence that ftfy finds unlikely; slower than `suspect`."""
    return is_bad(_near_foreign(text))


def _near_foreign(text: str) -> str:
    """The characters beyond ASCII with three on each side, a NUL for what is left out.

    None of ftfy's sequences reaches further, and its pattern is slow.
    """
    codes = code_points(text)
    foreign = codes > 0x7F
    near = foreign.copy()
    for reach in range(1, 4):
        near[reach:] |= foreign[:-reach]
        near[:-reach] |= foreign[reach:]
    kept = near.copy()
    kept[1:] |= near[:-1]
    kept = np.flatnonzero(kept)
    return (
        np.where(near[kept], codes[kept], 0)
        .astype("<u4")
        .tobytes()
        .decode("utf-32-le", "surrogatepass")
    )


def repair_encoding(text: str) -> tuple[str, int]:
    """Undo UTF-8 that was decoded as another code (ftfy), line by line: only some may be wrong."""
    count, lines = 0, []
    for line in text.split("\n"):
        fixed = ftfy.fix_encoding(line) if suspect(line) else line
        count += fixed != line
        lines.append(fixed)
    return "\n".join(lines), count


def garbled(text: str) -> float:
    """Wrongly decoded places a thousand characters, by ftfy's count of unlikely pairs."""
    return 1000.0 * badness(_near_foreign(text)) / len(text) if text else 0.0


def remove_controls(text: str) -> tuple[str, int]:
    """Remove characters that show nothing; make line ends, spaces and composition uniform."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\u2028", "\n").replace("\u2029", "\n\n").replace("\x85", "\n")
    if text.isascii():
        data = text.encode("ascii")
        left = data.translate(None, _ASCII_CONTROLS)
        return (left.decode("ascii"), len(data) - len(left)) if len(left) < len(data) else (text, 0)
    controls = joiners = 0
    if _ODD.search(text):
        text, controls = _CONTROLS.subn("", text)
        text = _SPACES.sub(" ", text)
    if "\u200c" in text or "\u200d" in text:
        text, joiners = _JOINERS.subn("", text)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return text, controls + joiners


def narrow(text: str) -> tuple[str, int]:
    """Full-width letters and digits as their common form; full-width punctuation is Chinese."""
    count = len(_HAS_FULL_WIDTH.findall(text))
    return (text.translate(_FULL_WIDTH), count) if count else (text, 0)


def remove_urls(text: str) -> tuple[str, int]:
    """Remove bare addresses; the punctuation behind one stays."""
    if "://" not in text and "www" not in text:
        return text, 0

    def tail(match: re.Match[str]) -> str:
        found = _URL_TAIL.search(match[0])
        return found[0] if found else ""

    return _URL.subn(tail, text)


def url_share(text: str) -> float:
    """The share of the text's characters, spaces not counted, that lie in addresses."""
    if "://" not in text and "www" not in text:
        return 0.0
    solid = sum(map(len, text.split()))
    return sum(len(match[0]) for match in _URL.finditer(text)) / solid if solid else 0.0


def remove_tags(text: str) -> tuple[str, int]:
    """Remove tags and comments of HTML, and write entities as their characters."""
    count = entities = 0
    if "<" in text:
        text, count = _TAG.subn("", text)
    if "&" in text:
        text, entities = _ENTITY.subn(lambda match: html.unescape(match[0]), text)
    return text, count + entities


def collapse_punctuation(text: str) -> tuple[str, int]:
    """Write a sign that is repeated three times or more, or four dots and more, once."""
    dots = 0
    if "...." in text:
        text, dots = _DOTS.subn(".", text)
    text, others = _REPEATED.subn(r"\1", text)
    return text, dots + others


def plain_numbers(text: str) -> tuple[str, int]:
    """Write integers without groups of thousands and without two zeros behind the point."""
    grouped = spaced = zeros = 0
    # Cheap signs of each form: the patterns look back, and are slow on text that has none.
    if _HAS_GROUPS.search(text):
        text, grouped = _GROUPED.subn(lambda match: match[0].replace(",", ""), text)
    if _HAS_SPACES.search(text) or "\u2009" in text:
        text, spaced = _SPACED.subn(lambda match: re.sub(r"\s", "", match[0]), text)
    if ".00" in text:
        text, zeros = _ZERO_CENTS.subn(r"\1", text)
    return text, grouped + spaced + zeros


def tidy_lines(text: str) -> str:
    """At most one blank line in a row, none at the ends; those within code and formulas stay."""
    if _BLANK_LINES.search(text):
        text, kept = shelter(text)
        # The end of a sheltered line is seen as one.
        pieces = text.split(MARK)
        for place, part in enumerate(kept):
            if part.endswith("\n"):
                kept[place], pieces[place + 1] = part[:-1], "\n" + pieces[place + 1]
        text = restore(_BLANK_LINES.sub("\n\n", MARK.join(pieces)), kept)
    return text.strip("\n")
