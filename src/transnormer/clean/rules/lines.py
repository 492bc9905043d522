"""Lines that are not part of the text: navigation of web pages, notices, watermarks.

The patterns are of kinds of lines that web pages and scanned books share, in English and Chinese.
Code, tables and headings are exempt.
"""

import re
import string
from collections import Counter
from typing import NamedTuple

from transnormer.clean.rules.markup import code_lines

_LONGEST = 160
_NAVIGATION_WORDS = """
home about us contact contacts product products services service blog news shop store cart basket
checkout login log in sign out register join account my profile search menu sitemap faq faqs help
support careers jobs press terms privacy policy policies cookie cookies use conditions of legal
notice rss feed facebook twitter tweet x pinterest pin it instagram linkedin youtube whatsapp
reddit tumblr email e-mail mail print share on this via like follow next previous prev newer older
first last back to top up categories category tags archive archives page pages skip content main
navigation close open toggle accept reject all manage preferences settings decline more read
download subscribe newsletter comments comment reply posts and the advertise advertisement
advertising sponsored copyright rights reserved forum forums gallery events video videos photos
wishlist compare language english
"""
_NAVIGATION = frozenset(_NAVIGATION_WORDS.split())
_SEPARATORS = re.compile(r"\s*[|·•»«›‹→←⟩⟨/]\s*|\s{2,}|\t+")
_ROW = re.compile(r"[|·•»«›‹→←⟩⟨/\t]")
_PUNCTUATION = " .,:;!?()[]*_-–—"
# What the notices below begin with, so that most lines cost one look-up.
_FIRST_WORDS = """
© c copyright please subscribe sign join you log click read learn view show see load find leave
post write add submit posted filed tagged published related recent popular latest similar trending
more advertisement advertisements sponsored promoted tap share tweet like follow javascript this
"""
_STARTS = frozenset("(©" + string.ascii_letters + string.digits)
_FIRST = frozenset(_FIRST_WORDS.split()) | frozenset(map(str, range(1000)))
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)?")
_ASCII_WORD = re.compile(r"[a-z]+(?:-[a-z]+)?")
# Whole lines, matched from their beginning to their end: these by their first words,
_NOTICES = (
    r"(?:©|\(c\)|copyright\b).{0,20}\d{4}.{0,80}",
    r"(?:please )?(?:subscribe|sign up|join)\b.{0,60}"
    r"\b(?:newsletter|mailing list|updates|email|channel)\b.{0,60}",
    r"you (?:must|need to|have to) (?:be )?(?:logged|log|signed|sign|registered|register)\b.{0,60}",
    r"(?:please )?(?:log|sign) ?in (?:or \w+ )?"
    r"to (?:post|comment|reply|continue|view|leave)\b.{0,40}",
    r"(?:click here to )?(?:read|learn|view|show|see|load|find out) (?:more|less|all)\b"
    r"(?: \w+){0,2}\W{0,4}",
    r"(?:leave|post|write|add|submit) (?:a|your) (?:comment|reply|review)\W{0,3}",
    r"(?:posted|filed|tagged|published) (?:in|under|by|on)\b.{0,60}",
    r"(?:related|recent|popular|latest|similar|trending|more) "
    r"(?:posts?|articles?|stories|news|topics|comments|links|products)\W{0,3}",
    r"(?:advertisements?|sponsored(?: content| links?)?|promoted)\W{0,3}",
    r"(?:click|tap) (?:here|to)\b.{0,50}",
    r"(?:share|tweet|like|follow)(?: us| this)? (?:on|this|with|via)\b.{0,50}",
    r"\d+ (?:comments?|replies|likes|shares|views|retweets)\W{0,3}",
    r"(?:javascript|this site) (?:is disabled|must be enabled|requires)\b.{0,100}",
)
_NOTICE = re.compile(rf"(?:{'|'.join(_NOTICES)})\Z", re.IGNORECASE)
# these by words that stand within,
_INNER_NOTICES = (
    r".{0,80}\ball rights reserved\b.{0,40}",
    r".{0,120}\b(?:uses?|accept(?:ing)?|our|these|all) cookies?\b.{0,120}",
    r".{0,60}\bcookie (?:policy|settings|preferences|notice)\b.{0,60}",
)
_INNER_NOTICE = re.compile(rf"(?:{'|'.join(_INNER_NOTICES)})\Z", re.IGNORECASE)
# and these in Chinese.
_CHINESE = (
    "版权所有|返回顶部|上一篇|下一篇|隐私政策|使用条款|分享到|相关(?:文章|阅读|推荐)|"
    "转载请注明|点击(?:查看|阅读|下载|进入)|阅读(?:全文|更多)|关注我们|扫码关注|登录后|发表评论|"
    "责任编辑"
)
_CHINESE_WORDS = re.compile(_CHINESE)
_CHINESE_NOTICE = re.compile(rf".{{0,20}}(?:{_CHINESE})[^。]{{0,40}}\Z")
# Anywhere in a line.
_WATERMARKS = (
    r"\b(?:downloaded|retrieved|scanned|digiti[sz]ed|uploaded|converted|printed|provided|generated|"
    r"licen[sc]ed|brought to you) (?:from|by|at|on|to|with|using)\b",
    r"\b(?:do|must) not (?:be )?(?:re)?(?:distribute|copy|share|reproduced|distributed|copied)\b",
    r"\bfor (?:personal|private|evaluation|review) use only\b",
    r"\bnot for (?:re-?sale|distribution|sale|circulation)\b",
    r"\bunauthori[sz]ed (?:copying|reproduction|distribution|use)\b",
    r"\b(?:free|more) (?:e-?)?books?\b.{0,40}\b(?:at|from|www|visit)\b",
    r"\bvisit (?:us at|www|https?)\b",
    r"\b(?:evaluation|trial|sample|draft|unregistered) (?:copy|version)\b",
    r"\bget (?:this|the) (?:e-?book|app)\b",
    r"仅供(?:个人|试读|学习|参考|内部)",
    r"更多.{0,12}(?:下载|电子书|资源|小说)",
    r"(?:本书|本文|本资料).{0,8}(?:来自|由.{1,12}(?:整理|扫描|制作))",
    r"(?:手机|免费)?阅读.{0,6}(?:尽在|就上|请访问)",
    r"请支持正版|(?:扫描|校对)[:：]|最新章节",
)
_WATERMARK = re.compile("|".join(_WATERMARKS), re.IGNORECASE)
_SITE = re.compile(
    r"\b(?:www\.|https?://)\S|\b[\w-]+\.(?:com|net|org|info|cn|io|test)\b|\d{4}-\d\d-\d\d"
)
_HINT = re.compile(r"\.(?:com|net|org|info|cn|io|test)|-[0-3]")
_EDGES = "-–—=*~_<>[](){}【】|# "
_EDGE = frozenset(_EDGES)
_EXEMPT = re.compile(r"\s*(?:[|#>`$]|[-–*+] |\d+[.)]\s|\.\. |:\w+:)")
# What an exempt line begins with, digits aside.
_EXEMPT_SIGNS = frozenset("|#>`$-–*+.:")


class _Holds(NamedTuple):
    """What a text holds anywhere: what it does not, its lines need not be asked for."""

    notices: bool
    chinese: bool
    sites: bool

    @classmethod
    def of(cls, text: str) -> "_Holds":
        lower = text.lower()
        return cls(
            "cookie" in lower or "rights res" in lower,
            not text.isascii() and _CHINESE_WORDS.search(text) is not None,
            _may_name_a_site(text),
        )


def _may_name_a_site(text: str) -> bool:
    return "://" in text or "www" in text or _HINT.search(text) is not None


def is_navigation(line: str) -> bool:
    """Whether a line is a row of links as pages have them, or a notice of a site."""
    line = line.strip()
    return bool(line) and len(line) <= _LONGEST and _is_navigation(line, _Holds.of(line))


def _is_navigation(line: str, holds: _Holds) -> bool:
    """The same of a line without spaces around it, of a text that holds these."""
    first = line.split(None, 1)[0].lower().strip(_PUNCTUATION)
    # A first word that a dash or a year is stuck to is none of the list.
    notable = first in _FIRST or (line[0] in _STARTS and not first.isascii())
    if notable and _NOTICE.match(line):
        return True
    if holds.notices and _INNER_NOTICE.match(line):
        return True
    if holds.chinese and _CHINESE_NOTICE.match(line):
        return True
    if line.isascii():
        # Four looks are cheaper than one of the pattern.
        row = "/" in line or "|" in line or "  " in line or "\t" in line
    else:
        row = "  " in line or _ROW.search(line) is not None
    if not row:
        return False
    words = (_ASCII_WORD if line.isascii() else _WORD).findall(line.lower())
    if not words or sum(map(_NAVIGATION.__contains__, words)) < 0.75 * len(words):
        return False
    segments = [part for part in _SEPARATORS.split(line) if part.strip()]
    return len(words) <= 4 * len(segments) + 2


def remove_lines(text: str, *, navigation: bool, watermarks: bool) -> tuple[str, int, int]:
    """Remove navigation and notices of sites, and marks of where a copy came from.

    A line is a mark when it reads like one and names a site or a date, is set in dashes or stands
    in the text twice, or when the same line of four words or more, with a site or a date, stands
    there three times.

    Returns the text, and how many lines of navigation and of marks went.
    """
    lines = text.split("\n")
    inside = code_lines(lines)
    # Whole lines, since the same one is judged once.
    counts = Counter(
        [
            line
            for line, code in zip(lines, inside, strict=True)
            if not code and len(line) < _LONGEST
        ]
    )
    counts.pop("", None)
    total = max(1, counts.total())
    holds = _Holds.of(text)
    gone: dict[str, bool] = {}
    for line, count in counts.items():
        bare = line.strip()
        if not bare:
            continue
        if (bare[0] in _EXEMPT_SIGNS or bare[0].isdecimal()) and _EXEMPT.match(line):
            continue
        if navigation and _is_navigation(bare, holds):
            gone[line] = True
        elif watermarks and _is_watermark(bare, count, total, holds):
            gone[line] = False
    if not gone:
        return text, 0, 0
    # A mark goes wherever it stands: who puts marks on pages does not look for code.
    kept = [
        line
        for line, code in zip(lines, inside, strict=True)
        if line not in gone or (code and gone[line])
    ]
    rows = sum(counts[line] for line, row in gone.items() if row)
    return "\n".join(kept), rows, len(lines) - len(kept) - rows


def _is_watermark(line: str, count: int, total: int, holds: _Holds) -> bool:
    decorated = line[0] in _EDGE and not line[:2].strip(_EDGES) and not line[-2:].strip(_EDGES)
    site = holds.sites and _may_name_a_site(line) and _SITE.search(line) is not None
    if count < 2 and not decorated and not site:
        return False
    if _WATERMARK.search(line):
        return count >= 2 or decorated or len(line) < _LONGEST // 2
    words = _WORD.findall(line)
    return (
        3 <= count <= 0.5 * total
        and (len(words) >= 4 or (len(line) >= 12 and not line.isascii()))
        and site
    )
