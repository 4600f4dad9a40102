"""The page in a real Chromium: pictures, and the boxes over them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_runtime.cli.demo import DemoPlan
from tests.server.browser import ask, attach, box, looking, rectangles, scripted, wait_until
from tests.server.conftest import Live, data_url, png, say

pytestmark = pytest.mark.cpu


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


def _decoded(part: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
