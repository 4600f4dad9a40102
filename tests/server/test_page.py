"""The page in a real Chromium: questions and answers, keys, languages, and what it must not do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime import Engine
from qvl_runtime.cli.demo import DemoPlan
from qvl_runtime.server.keys import Keys
from qvl_runtime.server.static import WEB
from tests.server.browser import ask, attach, box, looking, scripted, serious, wait_until
from tests.server.conftest import KEY, Live, keys_file, png, serving

pytestmark = pytest.mark.cpu
LONG = """
  const ask = fetch;
  window.fetch = (url, options) => {
    if (options?.body) options.body = JSON.stringify({ ...JSON.parse(options.body), min_tokens: 1500 });
    return ask(url, options);
  };
"""


def test_the_page_is_small_and_names_no_other_origin() -> None:
    files = [file for file in WEB.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 80_000
    text = "".join(file.read_text() for file in files)
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}  # the name of SVG, which is not fetched
    assert "style=" not in text and "onclick=" not in (WEB / "index.html").read_text()


def test_every_word_is_in_both_languages() -> None:
    text = (WEB / "strings.js").read_text()
    english, chinese = (re.findall(r"(?m)^  (\w+): \"", part) for part in text.split("const CHINESE"))
    assert english == chinese and len(english) > 60
    page = (WEB / "index.html").read_text()
    used = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', page))
    scripts = "".join(file.read_text() for file in WEB.glob("*.js") if file.name != "strings.js")
    used |= set(re.findall(r"\bt\(\"(\w+)\"", scripts)) | set(re.findall(r'\[\["?(\w+)"?, \{', scripts))
    assert used <= set(english)


def test_stop_answer_again_and_edit(live: Live, chromium: Any) -> None:
    with looking(chromium, live, script=LONG) as page:
        page.fill("#question", "Tell me everything")
        page.keyboard.press("Enter")
        wait_until(page, "document.querySelector('.assistant .text')?.textContent.length > 20")
        page.click("#stop")
        page.wait_for_selector("#send:visible")
        live.wait_free(5)
        assert page.inner_text(".assistant .facts") == "stopped"
        text = page.inner_text(".assistant .text")
        page.click(".assistant .actions button >> nth=0")
        page.wait_for_selector("#stop:visible")
        page.click("#stop")
        page.wait_for_selector("#send:visible")
        assert page.locator("#turns > li").count() == 2 and text
        page.click(".user .actions button")
        assert page.locator("#turns > li").count() == 0
        assert page.input_value("#question") == "Tell me everything"


def test_what_the_model_writes_stays_text(live: Live, chromium: Any) -> None:
    nasty = "<img src=x onerror=alert(1)>"
    text = f"😀 <ref>{nasty}</ref><box>(10,20),(500,600)</box> and <script>alert(2)</script>"
    with looking(chromium, live) as page:
        attach(page, ("a.png", "image/png", png()))
        boxes = [box(nasty, [10, 20, 500, 600], text.index("<box>"))]
        scripted(page, {"content": text[:9]}, {"content": text[9:], "qvl": {"boxes": boxes, "pictures": [{}]}})
        ask(page, "Box it")
        assert page.locator(".box").get_attribute("aria-label") == f"box {nasty} 0.90"
        assert page.inner_text(".assistant .text") == f"😀 {nasty} 0.90 and <script>alert(2)</script>"
        assert page.locator(".assistant img, .box img, .assistant script").count() == 0


def test_a_lost_connection_keeps_the_text_and_offers_another_try(live: Live, chromium: Any) -> None:
    with looking(chromium, live) as page:
        scripted(page, {"content": "Half an ans"}, done=False)
        ask(page, "Hello")
        assert page.inner_text(".assistant .text") == "Half an ans"
        assert page.inner_text(".assistant .error") == "The connection was lost before the answer ended."
        page.unroute("**/v1/chat/completions")
        page.click(".assistant .actions button >> nth=0")
        page.wait_for_selector(".assistant .facts")
        assert page.locator(".assistant .error").count() == 0
        page.route("**/v1/chat/completions", lambda route: route.abort())
        ask(page, "And now?")
        assert page.inner_text(".assistant .error") == "The server cannot be reached."


def test_an_error_of_the_server_is_shown_and_the_next_question_answered(live: Live, chromium: Any) -> None:
    with looking(chromium, live) as page:
        page.click("#open-settings")
        page.fill("#max-tokens", "100000")
        page.click("#settings .buttons button:visible")
        ask(page, "Hello")
        assert "exceeds the context of 2048 tokens" in page.inner_text(".assistant .error")
        page.click("#open-settings")
        page.fill("#max-tokens", "5")
        page.click("#settings .buttons button:visible")
        ask(page, "Hello")
        assert page.locator(".assistant >> nth=1").locator(".error").count() == 0


def test_events_cut_anywhere_are_joined(live: Live, chromium: Any) -> None:
    with looking(chromium, live) as page:
        wrong = page.evaluate(
            """async () => {
              const { events } = await import("/api.js");
              const text = ': note\\ndata: {"a": "图😀"}\\n\\ndata:x\\ndata: y\\r\\n\\r\\n'
                + 'event: z\\n\\ndata: [DONE]\\n\\n';
              const bytes = new TextEncoder().encode(text);
              for (let cut = 0; cut <= bytes.length; cut++) {
                const parts = [bytes.slice(0, cut), bytes.slice(cut)];
                const stream = new ReadableStream({ pull: c => parts.length ? c.enqueue(parts.shift()) : c.close() });
                const found = [];
                for await (const data of events(stream)) found.push(data);
                if (JSON.stringify(found) !== JSON.stringify(['{"a": "图😀"}', "x\\ny", "[DONE]"])) return [cut, found];
              }
            }"""
        )
        assert wrong is None


def test_a_key_is_asked_for_and_stays_in_the_tab(chromium: Any, tmp_path: Path) -> None:
    keys = Keys(keys_file(tmp_path))
    with (
        serving(lambda: Engine(max_model_len=512, isolate_images=False), keys) as live,
        looking(chromium, live) as page,
    ):
        for key in ("wrong", KEY):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        wait_until(page, "document.querySelector('#model').options.length > 0")
        ask(page, "Hello")
        assert page.locator(".assistant .error").count() == 0
        assert page.evaluate("sessionStorage.getItem('key')") == KEY
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        page.click("#open-settings")
        page.click("#forget-key")
        assert page.evaluate("sessionStorage.getItem('key')") is None


def test_enter_that_ends_a_word_of_an_input_method_does_not_send(live: Live, chromium: Any) -> None:
    press = """composing => document.querySelector("#question").dispatchEvent(
      new KeyboardEvent("keydown", { key: "Enter", isComposing: composing, bubbles: true, cancelable: true }))"""
    with looking(chromium, live) as page:
        page.fill("#question", "你好")
        page.evaluate(press, True)
        assert page.locator("#turns > li").count() == 0
        page.evaluate(press, False)
        page.wait_for_selector("#turns > li")


def test_without_a_mouse_on_a_phone_in_the_dark_in_chinese(live: Live, chromium: Any, demo: DemoPlan) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "locale": "zh-CN"}
    with looking(chromium, live, **options) as page:
        attach(page, ("demo.jpg", "image/jpeg", demo.image.read_bytes()))
        page.wait_for_selector("#frame:visible")
        page.focus("#question")
        page.keyboard.type("Box the cat.")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant .actions")
        assert page.get_attribute("html", "lang") == "zh-CN" and page.inner_text("#send") == "发送"
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.classList.contains('box')"):
                break
        assert page.locator("button.label.lit").count() == 1
        assert serious(page) == []
        page.click("#theme")
        assert page.get_attribute("html", "data-theme") == "light"  # the system is dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_in_the_way_of_assistive_technology(live: Live, chromium: Any, scheme: str) -> None:
    with looking(chromium, live, "/?example", color_scheme=scheme) as page:
        page.wait_for_selector(".assistant .actions")
        page.click("#draw")
        page.keyboard.press("Escape")
        assert serious(page) == []
        page.click("#open-settings")
        assert serious(page) == []
