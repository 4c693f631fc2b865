"""The chat page in a headless browser: a question is answered, the statistics are shown, a key is typed in."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Running, byte_tokenizer, running

from tiercache.serve.security import KEY_VARIABLE

sync_api = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no browser is installed; on Debian: apt-get install chromium-headless-shell")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv(KEY_VARIABLE, "a-key")
    with running(byte_tokenizer(tmp_path_factory.mktemp("page")), layer_s=0.01) as found:
        yield found


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """The page, which must load nothing else and complain of nothing."""
    made = browser.new_page(color_scheme="dark", viewport={"width": 700, "height": 600})
    troubles: list[str] = []
    made.on("pageerror", lambda error: troubles.append(str(error)))
    made.on("console", lambda line: troubles.append(line.text) if "Content Security" in line.text else None)
    made.troubles = troubles
    made.on(
        "request", lambda asked: None if asked.url.startswith((server.url, "data:")) else troubles.append(asked.url)
    )
    made.goto(server.url)
    yield made
    made.close()
    assert not troubles


def ask(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def test_a_chat_in_the_browser(page: Any, server: Running) -> None:
    stats, send = sync_api.expect(page.locator("#stats")), sync_api.expect(page.locator("#send"))
    stats.to_contain_text("key is missing")
    ask(page, "hello")
    page.wait_for_selector("article.error")
    assert page.input_value("#text") == "hello"  # what was refused can be sent again
    page.fill("#key", "a-key")
    page.press("#key", "Tab")
    sync_api.expect(page.locator("#model")).to_have_text("fake")
    page.fill("#tokens", "30")
    ask(page, "hello")
    stats.to_contain_text("dram")  # while it is written
    send.to_have_text("Stop")
    send.to_have_text("Send", timeout=10_000)
    for part in ("tokens · ", "tokens/s", "dram", "ssd", "% of drafts accepted"):
        stats.to_contain_text(part)
    answer = page.text_content("article.assistant")
    headers = {"Authorization": "Bearer a-key"}
    talk: list[dict[str, str]] = [{"role": "user", "content": "hello"}]
    body = {"messages": talk, "max_tokens": 30}
    wanted = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers).json()
    assert answer == wanted["choices"][0]["message"]["content"] != ""

    page.fill("#tokens", "200")
    ask(page, "<b>again</b>")
    sync_api.expect(page.locator("article.assistant >> nth=1")).to_contain_text(re.compile(".{3}"))
    page.click("#send")  # Stop
    send.to_have_text("Send")
    assert page.text_content("article.user >> nth=1") == "<b>again</b>"
    page.click("#reset")
    assert page.locator("article").count() == 0


def test_it_is_legible_in_light_and_dark(page: Any) -> None:
    """Contrast of text on its ground, by WCAG: 4.5 and more."""
    ratio = """() => {
        const light = (color) => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
            .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const ground = (node) => { for (; node; node = node.parentElement) {
            const color = getComputedStyle(node).backgroundColor;
            if (!color.startsWith("rgba(0, 0, 0, 0")) return color; } return "rgb(255, 255, 255)"; };
        show("user", "x"); show("assistant", "x"); show("error", "x"); $("stats").textContent = "x";
        return ["article.user", "article.assistant", "article.error", "#stats", "label", "#send", "#reset", "#text"]
            .map((name) => { const node = document.querySelector(name);
                const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
                return (a + 0.05) / (b + 0.05); }); }"""
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        assert min(page.evaluate(ratio)) >= 4.5, scheme


def test_speed_while_a_drafter_is_at_work(page: Any) -> None:
    """Its rounds count, not the few passes of one token beside them."""
    drafting = dict.fromkeys(("rounds", "tokens", "nodes", "accepted", "draft_s", "verify_s"), 1)
    before = {"tiers": {}, "ssd_bytes": 0, "decode_tokens": 4, "decode_s": 2, "drafting": drafting}
    plain = before | {"decode_tokens": 7, "decode_s": 4}
    gained = {"rounds": 10, "tokens": 30, "draft_s": 1, "verify_s": 5}
    drafted = plain | {"drafting": drafting | {name: drafting[name] + more for name, more in gained.items()}}
    speeds = [
        page.evaluate("([before, now]) => speed(since(before, now))", [before, now])
        for now in (plain, drafted, plain | {"drafting": None})
    ]
    assert speeds == [1.5, 5, 1.5]


def test_other_scripts_do_not_run(page: Any) -> None:
    page.evaluate("""() => { const script = document.createElement("script");
        script.textContent = "window.injected = true"; document.body.append(script);
        const image = document.createElement("div"); image.innerHTML = "<img src=x onerror='window.injected = true'>";
        document.body.append(image); }""")
    page.wait_for_timeout(200)
    assert page.evaluate("window.injected") is None
    assert len(page.troubles) >= 2  # the browser says what it blocked
    page.troubles.clear()
