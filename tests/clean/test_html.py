"""Pages of HTML become the text that a reader sees."""

from transnormer.clean.rules.html import is_page, page_text

PAGE = """<!DOCTYPE html><html><head><title>T</title><script>steal()</script></head><body>
<nav><a href=/>Home</a></nav><div class="site-menu">menu</div><div id=main>
<h2>Head &amp; shoulders</h2><p>One <b>bold</b>
line.</p><pre>
x =  1
</pre><ul><li>first</li><li>second</li></ul><table><tr><td>cell</td><td>next</td></tr></table>
<p onclick="x()">Last</p></div><footer>(c) 2020</footer></body></html>"""


def test_blocks_headings_and_code_of_a_page() -> None:
    assert is_page(PAGE)
    assert page_text(PAGE) == (
        "## Head & shoulders\n\nOne bold line.\n\n```\nx =  1\n```\n\nfirst\n\nsecond\n\ncell\n\n"
        "next\n\nLast"
    )


def test_lists_of_links_go_and_lists_with_text_stay() -> None:
    links = "".join(f"<li><a href=/{n}>Section {n}</a></li>" for n in range(5))
    body = f"<html><body><ul>{links}</ul><ul><li>a <a href=/>b</a> long item text</li></ul></body>"
    assert page_text(body) == "a b long item text"


def test_text_about_tags_is_no_page() -> None:
    assert not is_page("The <html> tag opens a page.")
    assert not is_page("# Head\n<p>inline</p>")


def test_a_very_deep_page_is_read() -> None:
    assert page_text("<html><body>" + "<div>" * 5000 + "deep") == "deep"
