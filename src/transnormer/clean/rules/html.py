"""Pages of HTML as text: headings as `#`, code fenced, a blank line between blocks.

The page is parsed by Lexbor (HTML5's rules for broken pages); scripts are dropped, never run, and
nothing that a page names is fetched. The tree is walked without recursion: depth is the attacker's
choice.
"""

import re
from collections.abc import Iterator

from selectolax.lexbor import LexborHTMLParser, LexborNode

_PAGE = re.compile(
    r"\s*(?:<\?xml[^>]{0,200}\?>\s*)?(?:<!--[^>]{0,2000}-->\s*)*"
    r"<(?:!doctype\s+html|html|head|body)\b",
    re.I,
)
_DROPPED_WORDS = """
script style noscript template nav header footer aside form iframe svg math button select input
textarea object embed canvas audio video dialog menu head title
"""
_DROPPED = frozenset(_DROPPED_WORDS.split())
_CHROME = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|navheader|navfooter|menu|menubar|sidebar|footer|header|"
    r"breadcrumbs?|cookies?|consent|banner|advert\w*|ads?|social|share|"
    r"sharing|toc|related|comments?|"
    r"newsletter|subscribe|popup|modal|pagination|pager)"
    r"(?:$|[\s_-])",
    re.I,
)
_BLOCKS_WORDS = """
address article blockquote body center dd details div dl dt fieldset figcaption figure h1 h2 h3 h4
h5 h6 hr html li main ol p pre section summary table tbody td tfoot th thead tr ul caption
"""
_BLOCKS = frozenset(_BLOCKS_WORDS.split())
_SPACE = re.compile(r"\s+")
# More text than this in links, and a list or block is a list of links.
_LINK_SHARE = 0.6
_CONTAINERS = frozenset(("div", "ul", "ol", "dl", "section"))


def is_page(text: str) -> bool:
    """Whether a text begins as a page of HTML does."""
    return _PAGE.match(text, 0, 10_000) is not None


def page_text(text: str) -> str:
    """Return what a reader of the page reads; navigation, forms and scripts left out."""
    body = LexborHTMLParser(text).body
    if body is None:
        return ""
    blocks: list[str] = []
    inline: list[str] = []
    level = 0

    def flush() -> None:
        nonlocal level
        found = _SPACE.sub(" ", "".join(inline)).strip()
        if found:
            blocks.append("#" * level + " " + found if level else found)
        inline.clear()
        level = 0

    for event, node in _walk(body):
        tag = node.tag or ""
        if event == "text":
            inline.append(node.text_content or "")
        elif tag == "br":
            inline.append(" ")
        elif tag == "pre":
            flush()
            code = (node.text(deep=True) or "").strip("\n")
            if code.strip():
                blocks.append(f"```\n{code}\n```")
        elif tag in _BLOCKS:
            flush()
            if event == "open" and len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
                level = int(tag[1])
    flush()
    return "\n\n".join(blocks)


def _walk(root: LexborNode) -> Iterator[tuple[str, LexborNode]]:
    """Yield (open, node), (close, node) of what is read, and (text, node) of texts."""
    stack: list[tuple[str, LexborNode]] = [("close", root)]
    stack += [("open", child) for child in reversed(_children(root))]
    while stack:
        event, node = stack.pop()
        tag = node.tag or ""
        if event == "close":
            yield event, node
        elif tag == "-text":
            yield "text", node
        elif not tag.startswith("-") and tag != "!doctype" and not _is_chrome(node, tag):
            yield "open", node
            if tag == "pre":
                continue
            stack.append(("close", node))
            stack += [("open", child) for child in reversed(_children(node))]


def _children(node: LexborNode) -> list[LexborNode]:
    return list(node.iter(include_text=True))


def _is_chrome(node: LexborNode, tag: str) -> bool:
    """Whether an element is part of the page's frame and not of its text."""
    if tag in _DROPPED:
        return True
    attributes = node.attributes
    names = f"{attributes.get('class') or ''} {attributes.get('id') or ''}"
    if attributes.get("role") in ("navigation", "banner", "contentinfo", "search"):
        return True
    if tag in ("html", "body", "main", "article"):
        return False
    if "hidden" in attributes or (names.strip() and _CHROME.search(names)):
        return True
    if tag not in _CONTAINERS:
        return False
    links = node.css("a[href]")
    # What holds paragraphs of its own is not a list of links, however many stand beside them.
    if len(links) < 3 or node.css_first("p, pre, h1, h2") is not None:
        return False
    solid = len(_SPACE.sub("", node.text(deep=True) or ""))
    linked = sum(len(_SPACE.sub("", link.text(deep=True) or "")) for link in links)
    return solid == 0 or linked / solid > _LINK_SHARE
