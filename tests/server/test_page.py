"""The web page, in a real Chromium against the server on the small checkpoint: what people do with it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_runtime import Engine
from qvl_runtime.cli.demo import DemoPlan
from qvl_runtime.server.keys import Keys
from qvl_runtime.server.static import WEB
from tests.server.browser import (
    ask,
    attach,
    box,
    chromium,
    looking,
    rectangles,
    scripted,
    serious,
    wait_until,
)
from tests.server.conftest import KEY, Live, data_url, keys_file, png, say, serving

pytestmark = pytest.mark.cpu
__all__ = ["chromium"]  # a fixture
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


@pytest.mark.parametrize(("ratio", "size"), [(1, (1200, 800)), (2, (700, 900))])
def test_boxes_are_where_the_model_says(
    live: Live, chromium: Any, demo: DemoPlan, demo_url: str, ratio: int, size: tuple[int, int]
) -> None:
    request = {"messages": say(demo.caption_prompt, demo_url), "temperature": 0}
    wanted = live.post("/v1/chat/completions", request).json()["choices"][0]["message"]["qvl"]["boxes"]
    viewport = {"width": size[0], "height": size[1]}
    with looking(chromium, live, "/?example", viewport=viewport, device_scale_factor=ratio) as page:
        page.wait_for_selector(".assistant .actions")
        names = page.locator(".box .tag").all_inner_texts()
        drawn = dict(zip(names, rectangles(page, ".box"), strict=True))
        assert set(drawn) == {f"{entry['label']} {entry['score']:.2f}" for entry in wanted}
        for entry in wanted:
            rectangle = drawn[f"{entry['label']} {entry['score']:.2f}"]
            assert rectangle == pytest.approx(entry["box"], abs=2)  # thousandths: a pixel of 500
        assert page.locator(".assistant button.label").count() == len(wanted)
        page.hover(".assistant button.label >> nth=1")
        assert page.locator(".box.lit").get_attribute("aria-label") == f"box number {wanted[1]['score']:.2f}"
        page.hover(".box.lit")
        assert page.inner_text("button.label.lit").startswith("number")


def test_pictures_are_chosen_dropped_and_pasted_and_numbered(live: Live, chromium: Any) -> None:
    drop = """([kind, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, { type: "image/png" }));
      document.body.dispatchEvent(kind === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true })
        : new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
    }"""
    with looking(chromium, live) as page:
        attach(page, ("a.png", "image/png", png("red")), ("b.png", "image/png", png("green")))
        page.wait_for_selector("#pending li:nth-child(2)")
        page.evaluate(drop, ["drop", list(png("blue"))])
        page.wait_for_selector("#pending li:nth-child(3)")
        page.evaluate(drop, ["paste", list(png("white"))])
        page.wait_for_selector("#pending li:nth-child(4)")
        assert page.locator("#pending .number").all_inner_texts() == ["1", "2", "3", "4"]
        page.click("#pending li:nth-child(2) .quiet")
        assert page.locator("#pending .number").all_inner_texts() == ["1", "2", "3"]
        with page.expect_request("**/v1/chat/completions") as asked:
            ask(page, "How many?")
        content = json.loads(asked.value.post_data)["messages"][0]["content"]
        sent = [part["image_url"]["url"] for part in content[:3]]
        assert sent == [data_url(png(color)) for color in ("red", "blue", "white")]  # their own bytes
        assert content[3] == {"type": "text", "text": "How many?"}
        page.click("#thumbnails li:nth-child(1) button")
        assert page.get_attribute("#image", "alt") == "Picture 1"


def test_a_photo_is_taken(live: Live, chromium: Any) -> None:
    with looking(chromium, live) as page:
        page.click("#empty .camera")
        page.wait_for_selector("#camera-dialog[open]")
        wait_until(page, "document.querySelector('#video').videoWidth > 0")
        page.click("#shoot")
        page.wait_for_selector("#pending li")
        assert page.evaluate("document.querySelector('#video').srcObject.active") is False
        page.click("#composer .camera")
        page.wait_for_selector("#camera-dialog[open]")
        page.keyboard.press("Escape")
        assert page.locator("#pending li").count() == 1


def test_files_that_are_no_pictures_are_named(live: Live, chromium: Any) -> None:
    with looking(chromium, live) as page:
        for file, expected in [
            (("empty.png", "image/png", b""), "empty.png is empty."),
            (("notes.txt", "text/plain", b"hello"), "notes.txt is not a picture."),
            (("photo.heic", "image/heic", b"\0\0\0\x18ftypheic"), "photo.heic cannot be shown by this browser"),
            (("drawing.svg", "image/svg+xml", b"<svg"), "drawing.svg cannot be shown by this browser"),
        ]:
            attach(page, file)
            wait_until(page, f"document.querySelector('#notice').textContent.startsWith('{expected}')")
            assert page.locator("#pending li").count() == 0


def test_a_rotated_photo_is_sent_upright_and_a_large_one_within_the_limits(live: Live, chromium: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    photo = io.BytesIO()
    Image.new("RGB", (80, 40), "red").save(photo, "JPEG", exif=exif)
    limits = live.engine.engine_config.image_limits
    wide = io.BytesIO()
    Image.new("1", (limits.max_image_side + 1000, 8)).save(wide, "PNG")
    with looking(chromium, live) as page:
        attach(page, ("photo.jpg", "image/jpeg", photo.getvalue()), ("wide.png", "image/png", wide.getvalue()))
        page.wait_for_selector("#pending li:nth-child(2)")
        assert page.inner_text("#notice").startswith("wide.png was reduced to")
        with page.expect_request("**/v1/chat/completions") as asked:
            ask(page, "Hello")
        parts = json.loads(asked.value.post_data)["messages"][0]["content"]
        upright, reduced = (_decoded(part) for part in parts[:2])
        assert upright.size == (40, 80) and reduced.size[0] == limits.max_image_side


def test_a_rectangle_becomes_the_questions_box(live: Live, chromium: Any, demo: DemoPlan) -> None:
    with looking(chromium, live) as page:
        attach(page, ("demo.jpg", "image/jpeg", demo.image.read_bytes()))
        page.wait_for_selector("#frame:visible")
        page.click("#draw")
        frame = page.locator("#frame").bounding_box()
        page.mouse.move(frame["x"] + frame["width"] * 0.6, frame["y"] + frame["height"] * 0.7)
        page.mouse.down()
        page.mouse.move(frame["x"] + frame["width"] * 0.1, frame["y"] + frame["height"] * 0.2, steps=3)
        page.mouse.up()
        assert rectangles(page, ".drawn") == [pytest.approx([100, 200, 600, 700], abs=4)]
        assert page.input_value("#question") == "[box]"
        page.fill("#box-row input >> nth=0", "150")
        page.keyboard.press("Tab")
        with page.expect_request("**/v1/chat/completions") as asked:
            ask(page, "What is in [box] here?")
        before, drawn, after = json.loads(asked.value.post_data)["messages"][0]["content"][1:]
        assert (before["text"], after["text"]) == ("What is in ", " here?")
        assert drawn["box"] == pytest.approx([150, 200, 600, 700], abs=4)
        page.click("#draw")
        page.keyboard.press("Escape")
        assert page.get_attribute("#draw", "aria-pressed") == "false"


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


def test_scores_hide_boxes_and_files_hold_the_rest(live: Live, chromium: Any, tmp_path: Path) -> None:
    text = "<ref>dog</ref><box>(0,0),(500,500)</box><ref>cat</ref><box>(500,100),(900,300)</box>"
    first, second = (text.index("<box>"), text.rindex("<box>"))
    boxes = [box("dog", [0, 0, 500, 500], first, 0.3), box("cat", [500, 100, 900, 300], second, 0.8)]
    with looking(chromium, live) as page:
        attach(page, ("two animals.png", "image/png", png("white", (400, 200))))
        scripted(page, {"content": text, "qvl": {"boxes": boxes, "pictures": [{}]}})
        ask(page, "Box both")
        assert page.inner_text("#box-count") == "2 boxes"
        page.fill("#score", "0.5")
        assert page.inner_text("#box-count") == "1 box"
        assert page.locator(".box .tag").all_inner_texts() == ["cat 0.80"]
        with page.expect_download() as saved:
            page.click("#save-json")
        saved.value.save_as(tmp_path / "boxes.json")
        content = json.loads((tmp_path / "boxes.json").read_text())
        assert saved.value.suggested_filename == "two animals-boxes.json"
        assert content["question"] == "Box both" and content["answer"] == text
        assert [(entry["label"], entry["pixels"]) for entry in content["boxes"]] == [("cat", [200, 20, 360, 60])]
        with page.expect_download() as saved:
            page.click("#save-png")
        saved.value.save_as(tmp_path / "boxes.png")
        with Image.open(tmp_path / "boxes.png") as picture:
            assert picture.size == (400, 200)
            assert picture.convert("RGB").getpixel((200, 40)) != (255, 255, 255)  # the cat's left edge
            assert picture.convert("RGB").getpixel((60, 100)) == (255, 255, 255)  # the dog was hidden


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_in_the_way_of_assistive_technology(live: Live, chromium: Any, scheme: str) -> None:
    with looking(chromium, live, "/?example", color_scheme=scheme) as page:
        page.wait_for_selector(".assistant .actions")
        page.click("#draw")
        page.keyboard.press("Escape")
        assert serious(page) == []
        page.click("#open-settings")
        assert serious(page) == []


def _decoded(part: dict[str, Any]) -> Image.Image:
    import base64

    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
