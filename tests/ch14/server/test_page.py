"""The page of the glass engine in a real browser: Debian's chromium, which `.ci/run` installs."""

import json
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
from serving import Serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: apt install chromium")
NUMBERS = "running", "waiting", "steps", "nfree", "ncached", "nowned"


@pytest.fixture(scope="module")
def server():
    with Serving("--num_blocks=120") as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def steady(route):
    """The same story every time, and one that does not end early."""
    asked = json.loads(route.request.post_data)
    route.continue_(post_data=json.dumps(asked | {"seed": 1, "logit_bias": {"50256": -100}}))


@pytest.fixture
def open_page(server, browser):
    """Opens pages; at the end none of them may have complained."""
    context, complaints = browser.new_context(viewport={"width": 1200, "height": 800}), []

    def open_page(width=1200):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        page.route("**/v1/chat/completions", steady)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(server.url + "/")
        page.wait_for_selector("#kernels a")
        return page

    yield open_page
    context.close()
    assert not complaints


def say(page, text):
    page.fill("#text", text)
    page.keyboard.press("Enter")


def numbers(page):
    return {name: int(page.inner_text(f"#{name}") or 0) for name in NUMBERS}


def until(page, test):
    page.wait_for_function(f"() => {test}", timeout=30_000)


def step(server, n):
    """The tiny model is fast, and its stories are short: it takes steps when it is told to."""
    assert server.request("/engine/steps", {"n": n})[0] == 200


def test_a_conversation(open_page, server):
    page = open_page()
    assert page.inner_text("#title") == "Chat with tiny"
    step(server, 9)
    say(page, "Once upon a time there was a cat. " * 30)
    until(page, "document.querySelectorAll('#rows .row').length > 0")
    until(page, "document.querySelector('#said p:last-child').innerText.length > 8")
    found = numbers(page)
    assert found["running"] == 1 and found["nfree"] + found["ncached"] + found["nowned"] == 120
    assert page.evaluate("known.length") > 5 and "request" in page.inner_text("#rows")
    assert page.is_enabled("#stop") and page.is_disabled("#send")
    server.request("/engine/resume", {})
    page.wait_for_selector("#send:not(:disabled)", timeout=60_000)
    until(page, "document.querySelector('#running').innerText === '0'")
    assert page.locator(".turn").count() == 2 and page.inner_text("#nowned") == "0"
    link = page.locator("#kernels a").first.get_attribute("href")
    assert server.request(link)[0] == 200


def test_a_cancellation(open_page, server):
    page = open_page()
    before = server.metrics()["request_aborted_total"]
    for count in (1, 2):
        step(server, 8)
        say(page, "Tell me a story.")
        until(page, "document.querySelector('#said p:last-child').innerText.length > 8")
        page.click("#stop")
        until(page, f"document.querySelectorAll('.turn .note').length === {count}")
        while server.metrics()["request_aborted_total"] < before + count:
            page.wait_for_timeout(20)
        server.request("/engine/resume", {})
        server.settle()
    assert "You have stopped it." in page.inner_text("#said")


def test_two_tabs_share_the_steps_and_one_can_stop_them(open_page, server):
    one, other = open_page(), open_page(width=420)
    one.click("#pause")
    for page in (one, other):
        until(page, "document.querySelector('#state').innerText === 'stopped'")
    say(one, "The dog and the cat went to the river.")
    say(other, "The dog and the cat went to the hill.")
    one.wait_for_timeout(300)
    steps = numbers(one)["steps"]
    for count in range(1, 4):
        one.click("#step")
        until(other, f"document.querySelector('#steps').innerText === '{steps + count}'")
    until(one, "document.querySelector('#running').innerText === '2'")
    assert one.locator("#rows .row").count() == 2
    other.select_option("#pace", "30")
    until(one, "document.querySelector('#pace').value === '30'")
    other.click("#pause")
    until(one, f"+document.querySelector('#steps').innerText > {steps + 4}")
    until(one, "document.querySelector('#running').innerText === '0'")
    server.settle()
    assert other.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a narrow screen scrolls sideways"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(browser, server, scheme):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(server.url + "/")
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light = lambda text: sum(map(int, text[text.index("(") + 1 : -1].split(",")[:3])) / 765
    assert abs(light(ink) - light(paper)) > 0.6 and (light(paper) > 0.5) == (scheme == "light")
    context.close()


def test_a_key_is_asked_for(browser):
    with Serving("--api_key=secret") as served:
        page = browser.new_page()
        page.goto(served.url + "/")
        page.wait_for_selector("#key:not([hidden])")
        page.fill("#keytext", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#kernels a")
        say(page, "Hello.")
        until(page, "document.querySelector('#said p:last-child').innerText.length > 20")
        page.close()
