"""Personal data: where it stands in a text, and a mask for each kind.

What a rule can check it checks: Luhn's sum of cards, ISO 7064 sums of IBANs and of Chinese identity
numbers, the ranges of addresses. Private, loopback and mask addresses name no person.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

MASKS = {
    "email": "[EMAIL]",
    "phone": "[PHONE]",
    "ip": "[IP]",
    "ssn": "[SSN]",
    "cn_id": "[ID]",
    "credit_card": "[CARD]",
    "iban": "[IBAN]",
    "address": "[ADDRESS]",
}


class Span(NamedTuple):
    """text[start:end] is personal data of this kind."""

    start: int
    end: int
    kind: str


def _card(text: str) -> bool:
    digits = [int(char) for char in text if char.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _iban(text: str) -> bool:
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def _chinese_id(text: str) -> bool:
    year, month, day = int(text[6:10]), int(text[10:12]), int(text[12:14])
    if not (1880 <= year <= 2100 and 1 <= month <= 12 and 1 <= day <= 31):
        return False
    total = sum(int(char) * pow(2, 17 - place, 11) for place, char in enumerate(text[:17]))
    # A made-up number with X at its end has no other reading.
    return text[17] in "Xx" or (12 - total) % 11 == int(text[17])


def _address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 4:
        first = int(text.split(".")[0])
        private = first in (0, 10, 127, 255) or text.startswith(("192.168.", "172.16.", "169.254."))
        return not private and first < 224 and not text.endswith((".0.0", ".0.0.0"))
    return len(address.compressed) > 8 and not (address.is_loopback or address.is_link_local)


def _always(text: str) -> bool:
    return True


_STREET = (
    "Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Way|Court|Ct|Place|Pl|Square|Sq|"
    "Terrace|Highway|Hwy|Parkway|Pkwy"
)


class _Rule(NamedTuple):
    kind: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool]
    # What a string of digits and signs needs for the rule to be tried: digits, and signs among
    # which one must stand so many times.
    digits: int = 0
    sign: str = ""
    signs: int = 0


# Numbers are looked for around strings of digits only: a search of the whole text costs ten times
# as much.
_DIGITS = re.compile(r"\d[\d ().:/-]{5,}")
_SIGNS = str.maketrans("", "", " ().:/-")
# Letters stand among the digits of an IBAN: it is looked for this far around.
_AROUND = 40
_IBAN_HEAD = re.compile(r"[A-Z]{2}\d\d")
_IBAN = _Rule(
    "iban", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban
)
# The others lie within the string, but for one sign before it and one letter behind.
_NUMBERS = (
    _Rule("cn_id", re.compile(r"(?<![\w.-])\d{17}[\dXx](?![\w-])"), _chinese_id, 17),
    _Rule(
        "credit_card",
        re.compile(
            r"(?<![\w.,-])(?:[3-6]\d{12,18}|[3-6]\d{3}(?:[ -]\d{4}){3}"
            r"|3\d{3}[ -]\d{6}[ -]\d{5})(?![\w-])"
        ),
        _card,
        13,
    ),
    _Rule(
        "ssn",
        re.compile(r"(?<![\w-])(?!000|666)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
        _always,
        9,
        "-",
        2,
    ),
    _Rule(
        "phone",
        re.compile(
            r"(?<![\w+.-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"
            r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|(?:1[ .-])?[2-9]\d{2}([.-])[2-9]\d{2}\1\d{4}"
            r"|1[3-9]\d{9})(?![\w-]|\.\d)"
        ),
        _always,
        10,
    ),
    _Rule(
        "ip",
        re.compile(r"(?<![\w.:/-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)"),
        _address,
        4,
        ".",
        3,
    ),
)
# With the sign of a country before it a number of so many digits may be a phone's.
_WITH_PLUS = 5
# (a pattern that must be found for the rule to be tried, the rule)
_OTHERS = (
    (
        re.compile("@"),
        _Rule(
            "email",
            re.compile(
                r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}"
                r"[A-Za-z]{2,24}\b"
            ),
            _always,
        ),
    ),
    (
        re.compile(r":[0-9a-fA-F]{0,4}:[0-9a-fA-F]{0,4}:"),
        _Rule(
            "ip",
            re.compile(r"(?<![\w:.])[0-9a-fA-F]{1,4}(?:::?[0-9a-fA-F]{1,4}){3,7}(?![\w:])"),
            _address,
        ),
    ),
    (
        re.compile(r", [A-Z]{2},? \d{5}\b"),
        _Rule(
            "address",
            re.compile(
                rf"\b\d{{1,5}} (?:[A-Z][\w.'’-]{{0,30}} ){{1,4}}(?:{_STREET})\b\.?"
                r"(?:, (?:Apt|Suite|Unit|Floor)\.? ?\w{1,6})?"
                r"(?:, [A-Z][\w.'’ -]{1,40}){1,2},? [A-Z]{2},? \d{5}(?:-\d{4})?\b"
            ),
            _always,
        ),
    ),
)
# Of finds that begin at the same place the first kind of this order counts.
_ORDER = {
    rule.kind: place for place, rule in enumerate((_IBAN, *_NUMBERS, *(r for _, r in _OTHERS)))
}


def find_pii(text: str) -> list[Span]:
    """Return the personal data of a text, in order and without overlaps."""
    taken: set[Span] = set()

    def take(rule: _Rule, start: int, end: int) -> None:
        for match in rule.pattern.finditer(text, start, end):
            if rule.check(match[0]):
                taken.add(Span(match.start(), match.end(), rule.kind))

    for guard, rule in _OTHERS:
        if guard.search(text):
            take(rule, 0, len(text))
    for found in _DIGITS.finditer(text):
        start, end = found.span()
        before, behind = max(0, start - _AROUND), min(len(text), end + _AROUND)
        if _IBAN_HEAD.search(text, before, behind):
            take(_IBAN, before, behind)
        digits = len(found[0].translate(_SIGNS))
        plus = start > 0 and text[start - 1] == "+" and digits >= _WITH_PLUS
        for rule in _NUMBERS:
            enough = digits >= rule.digits or (plus and rule.kind == "phone")
            if enough and (not rule.signs or found[0].count(rule.sign) >= rule.signs):
                take(rule, max(0, start - 1), min(len(text), end + 2))
    spans: list[Span] = []
    for span in sorted(taken, key=lambda span: (span.start, _ORDER[span.kind], -span.end)):
        if not spans or span.start >= spans[-1].end:
            spans.append(span)
    return spans


def mask(text: str, spans: list[Span]) -> str:
    """Replace every span by the mask of its kind."""
    out, at = [], 0
    for span in spans:
        out += [text[at : span.start], MASKS[span.kind]]
        at = span.end
    out.append(text[at:])
    return "".join(out)
