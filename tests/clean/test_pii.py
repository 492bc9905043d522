"""Personal data: found where it is, and nothing else masked."""

import pytest

from transnormer.clean.rules.pii import find_pii, mask


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("alex.demo+x@mail.example.org", "email"),
        ("+1 (202) 555-0103", "phone"),
        ("(202) 555-0103", "phone"),
        ("202-555-0103", "phone"),
        ("+44 20 7946 0958", "phone"),
        ("13800000022", "phone"),
        ("198.51.100.7", "ip"),
        ("2001:db8:85a3:1:2:8a2e:370:7334", "ip"),
        ("912-20-8510", "ssn"),
        ("00000019670523625X", "cn_id"),
        ("4111 1111 1111 1111", "credit_card"),
        ("378282246310005", "credit_card"),
        ("GB33BUKB20201555555555", "iban"),
        ("DE89 3704 0044 0532 0130 00", "iban"),
        ("1251 Fictional Street, Exampletown, ZZ 84153", "address"),
    ],
)
def test_each_kind_is_found_to_the_character(value: str, kind: str) -> None:
    text = f"Write to {value}, or not."
    assert find_pii(text) == [(9, 9 + len(value), kind)]


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112 has a wrong sum",
        "GB34BUKB20201555555555 too",
        "192.168.0.1, 127.0.0.1, 10.1.2.3, 255.255.255.0 and 0.0.0.0 are nobody's",
        "version 1.2.3.4.5 of 999.1.1.1",
        "ISBN 978-3-16-148410-0",
        "std::vector::iterator::value and a:b:c",
        "commit 4111111111111111abc",
        "pages 123-145, 2021-02-21 15:43:29",
        "in 1,234,567 cases of 3.14159265",
        "the 21 High Road",
        "user@localhost",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert find_pii(text) == []


def test_masks_replace_spans_and_leave_the_rest() -> None:
    text = "a@b.cc or 202-555-0103."
    assert mask(text, find_pii(text)) == "[EMAIL] or [PHONE]."


def test_a_megabyte_of_digits_takes_no_time_that_grows_with_its_square() -> None:
    assert find_pii("12 " * 300_000) == []
