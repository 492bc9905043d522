"""The page in a real browser."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_cases import Start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,800",
)
HELLO = "hello"


class Page:
    """The page, as somebody sees and uses it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)
        self.wait(lambda: "parameters" in self.text("model"))

    def wait(self, claim: Callable[[], bool]) -> None:
        """Until something is so."""
        end = time.monotonic() + 40
        while not claim():
            assert time.monotonic() < end, self.driver.find_element("tag name", "body").text
            time.sleep(0.05)

    def find(self, name: str) -> Any:
        """The element of an id."""
        return self.driver.find_element("id", name)

    def text(self, name: str) -> str:
        """What an element shows."""
        return self.find(name).text

    def click(self, name: str) -> None:
        """Press a button."""
        self.find(name).click()

    def fill(self, name: str, value: str) -> None:
        """Write into a field."""
        self.find(name).clear()
        self.find(name).send_keys(value)

    def idle(self) -> None:
        """Until no answer is coming."""
        self.wait(lambda: self.find("send").is_displayed())

    def ask(self, text: str) -> None:
        """Say something and hear the answer out."""
        self.fill("input", text)
        self.click("send")
        self.idle()

    def said(self) -> list[str]:
        """The words of all messages."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll('.said')].map((x) => x.textContent)"
        )

    def conversations(self) -> list[Any]:
        """The buttons of the list."""
        return self.driver.find_elements("css selector", "#list button")


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """Where saved conversations go."""
    return tmp_path


@pytest.fixture
def browser(downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser of its own."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no Chromium with its driver; apt-get install chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, start: Start) -> Page:
    """The page of a server of its own, greedy and brief."""
    shown = Page(browser, start("--batch-invariant", "--max-new-tokens=5000").url)
    shown.fill("temperature", "0")
    shown.fill("max_tokens", "12")
    return shown


def greedy(page: Page, messages: list[dict[str, str]]) -> str:
    """What the server says to a conversation."""
    url = page.driver.current_url
    asked = {"messages": messages, "max_tokens": 12, "temperature": 0, "top_p": 0.95}
    with httpx.Client(base_url=url, trust_env=False) as client:
        answer = client.post("/v1/chat/completions", json=asked).json()
    return answer["choices"][0]["message"]["content"]


def test_a_conversation_streams_and_shows_its_figures(page: Page) -> None:
    page.ask(HELLO)
    user = {"role": "user", "content": HELLO}
    first = greedy(page, [user])
    assert page.said() == [HELLO, first]
    page.ask("more")
    # The second turn goes on from the state, and is that of the whole conversation.
    further = [user, {"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    assert page.said() == [HELLO, first, "more", greedy(page, further)]
    assert page.text("speed").endswith("tokens/s")
    assert page.text("first").endswith("ms")
    assert page.text("tokens") == f"{1 + 6 + 12 + 1 + 5 + 12} tokens"
    assert page.text("state") == "8.2 kB, at any length"
    assert page.driver.get_log("browser") == []


def test_a_fork_leaves_the_other_branch_alone(page: Page) -> None:
    page.ask(HELLO)
    page.click("fork")
    page.ask("left")
    left = page.said()
    page.conversations()[0].click()
    assert page.said() == left[:2]
    page.ask("right")
    right = page.said()
    assert right[:2] == left[:2]
    assert right[3] != left[3]
    page.conversations()[1].click()
    assert page.said() == left
    # A fork at an earlier turn has what was said until then.
    page.driver.find_element("css selector", ".under button").click()
    assert page.said() == left[:2]
    assert len(page.conversations()) == 3


def test_a_saved_conversation_goes_on_where_it_was(page: Page, downloads: Path) -> None:
    page.ask(HELLO)
    page.click("save")
    page.wait(lambda: (downloads / "hello.json").is_file())
    kept = json.loads((downloads / "hello.json").read_text())
    assert kept["state"]
    page.ask("more")
    expected = page.said()
    page.driver.refresh()
    page.wait(lambda: "parameters" in page.text("model"))
    page.fill("temperature", "0")
    page.fill("max_tokens", "12")
    page.find("file").send_keys(str(downloads / "hello.json"))
    page.wait(lambda: page.said() == expected[:2])
    page.ask("more")
    assert page.said() == expected
    wrong = [{}, None, {"format": kept["format"], "text": ""}, kept | {"messages": [None]}]
    for i, other in enumerate(wrong):
        (downloads / f"other{i}.json").write_text(json.dumps(other))
        page.find("file").send_keys(str(downloads / f"other{i}.json"))
        page.wait(lambda i=i: f"other{i}.json is not a saved conversation" in page.text("alert"))
    assert page.said() == expected


def test_a_text_is_continued_in_place(page: Page) -> None:
    page.click("mode-text")
    page.fill("text", "Once")
    page.click("send")
    page.idle()
    first = page.find("text").get_property("value")
    assert first.startswith("Once")
    assert len(first) > 4
    page.find("text").send_keys(" and")
    page.click("send")
    page.idle()
    longer = page.find("text").get_property("value")
    assert longer.startswith(f"{first} and")
    assert page.text("speed").endswith("tokens/s")


def test_a_text_that_a_stop_text_ended_goes_on_from_what_it_shows(page: Page) -> None:
    def go() -> str:
        page.click("send")
        page.idle()
        return page.find("text").get_property("value")

    def stop_at(text: str) -> None:
        page.driver.execute_script("document.getElementById('stop').value = arguments[0]", text)

    page.click("mode-text")
    page.fill("text", "Once")
    whole = go()
    stop_at(whole[8])
    page.driver.execute_script("document.getElementById('new').click()")
    page.fill("text", "Once")
    shown = go()
    assert shown == whole[: whole.index(whole[8], 4)]
    assert page.text("tokens") != "0 tokens"
    stop_at("")
    page.find("text").send_keys(" and")
    longer = go()
    asked = {"prompt": f"{shown} and", "max_tokens": 12, "temperature": 0}
    with httpx.Client(base_url=page.driver.current_url, trust_env=False) as client:
        answer = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    assert longer == f"{shown} and{answer}"


def test_an_answer_is_stopped_and_remembered(page: Page) -> None:
    page.fill("max_tokens", "5000")
    page.fill("input", HELLO)
    page.click("send")
    page.wait(lambda: len(page.said()) == 2 and len(page.said()[1]) > 3)
    page.click("stop-button")
    page.idle()
    said = page.said()
    assert said[1]
    page.fill("max_tokens", "12")
    page.ask("and now?")
    assert page.said()[:3] == [*said, "and now?"]
    assert not page.find("alert").is_displayed()


def test_what_goes_wrong_is_shown(page: Page) -> None:
    page.fill("max_tokens", "999999")
    page.ask(HELLO)
    assert "max_completion_tokens is 999999; expected at most 5000" in page.text("alert")
    # Nothing is lost: the message is where it was written.
    assert page.find("input").get_property("value") == HELLO
    assert page.said() == []


def test_a_server_that_has_gone_is_told(browser: Any, start: Start) -> None:
    server = start()
    page = Page(browser, server.url)
    server.stop()
    page.ask(HELLO)
    assert "cannot be reached" in page.text("alert")


def test_the_page_asks_for_the_key(browser: Any, start: Start, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    server = start(f"--api-key-file={tmp_path / 'key'}")
    browser.get(server.url)
    end = time.monotonic() + 20
    while not browser.find_element("id", "ask-key").is_displayed():
        assert time.monotonic() < end
    browser.find_element("id", "key").send_keys("secret\n")
    while "parameters" not in browser.find_element("id", "model").text:
        assert time.monotonic() < end


def test_everything_has_a_name_and_comes_from_here(page: Page) -> None:
    nameless = page.driver.execute_script(
        "return [...document.querySelectorAll('button, input, textarea')].filter((x) => "
        "!(x.labels?.length || x.getAttribute('aria-label') || x.textContent.trim()))"
        ".map((x) => x.outerHTML)"
    )
    assert nameless == []
    foreign = page.driver.execute_script(
        "return performance.getEntriesByType('resource').map((x) => x.name)"
        ".filter((x) => !x.startsWith(location.origin) && !x.startsWith('data:'))"
    )
    assert foreign == []
