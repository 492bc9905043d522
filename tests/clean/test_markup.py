"""Code, formulas and Markdown come through the edits byte for byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transnormer.clean.config import RulesConfig
from transnormer.clean.item import Item
from transnormer.clean.rules.markup import MARK, code_lines, restore, shelter
from transnormer.clean.rules.quality import Quality
from transnormer.clean.steps import EditText


def edit(text: str) -> str:
    item = Item(text=text, id="x")
    EditText(RulesConfig(), Quality()).apply(item)
    return item.text


@pytest.mark.parametrize(
    "kept",
    [
        "$a_{1,000,000} = b!!!!$",
        "$$\\sum_{i}^{n} x_i,,,, <b>$$",
        "\\(x,,,,y\\)",
        "\\[ 1,234,567 \\]",
        "\\begin{align}a &= b,,,, \\\\ c\\end{align}",
        "`x,,,, := f(1,000)`",
        "``two ticks,,,, here``",
        "[text](http://example.org/a,,,,b)",
        "![image](http://example.org/i.png)",
        "<http://example.org/auto>",
        "[ref][1,,,,]",
    ],
)
def test_what_stands_in_a_line_is_kept(kept: str) -> None:
    assert edit(f"before,,,, {kept} after!!!!") == f"before, {kept} after!"


@pytest.mark.parametrize(
    "kept",
    [
        "```\na = 1,000,,,,\n<b>http://example.org</b>\n```",
        "~~~python\nx!!!!\n~~~",
        "    indented,,,, code\n    more....",
        "[1]: http://example.org/definition",
        ".. _label: http://example.org/x",
        "======\n......",
        "+----+----+\n|....|....|",
    ],
)
def test_whole_lines_are_kept(kept: str) -> None:
    text = f"before,,,,\n\n{kept}\n\nafter"
    assert edit(text) == f"before,\n\n{kept}\n\nafter"


@pytest.mark.parametrize(
    "kept",
    [
        "```\na = 1\n\n\ndef f():\n    pass\n```",
        "    indented = 1\n\n\n    more = 2",
        "\\begin{verbatim}\na\n\n\nb\n\\end{verbatim}",
    ],
)
def test_blank_lines_within_code_are_kept_and_those_around_it_are_not(kept: str) -> None:
    text = f"see http://example.org/a now\n\n\n\n{kept}\n\n\n\nafter"
    assert edit(text) == f"see  now\n\n{kept}\n\nafter"


def test_money_is_no_formula() -> None:
    assert edit("costs $5 and,,,, then $6 more") == "costs $5 and, then $6 more"


def test_a_fence_that_is_not_closed_hides_nothing() -> None:
    assert edit("```\nx,,,,\n\nprose,,,,") == "```\nx,\n\nprose,"


def test_a_longer_fence_holds_a_shorter_one() -> None:
    lines = ["````", "```", "x", "```", "````", "y"]
    assert code_lines(lines) == [True] * 5 + [False]


@given(st.text(alphabet="ab`$\\[]()~|-=. \n\t" + MARK, max_size=200))
def test_shelter_and_restore_change_nothing(text: str) -> None:
    assert restore(*shelter(text)) == text.replace(MARK, "")
