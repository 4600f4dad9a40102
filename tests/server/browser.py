"""A real Chromium that looks at the page, and what it must never do: reach elsewhere, break its policy, throw."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Live

CHROMIUM = os.environ.get("QVL_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).parents[2] / "build" / "npm" / "node_modules" / "axe-core" / "axe.min.js"
ARGUMENTS = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
VIOLATIONS = "addEventListener('securitypolicyviolation', e => (window.violations ??= []).push(e.violatedDirective))"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser for the tests of one file: as long as playwright runs, this thread can run no event loop of its own."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium is in PATH; QVL_CHROMIUM may name one")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def looking(chromium: Any, live: Live, path: str = "/", script: str = "", **options: Any) -> Iterator[Any]:
    """A tab on the page; afterwards it has reached no other origin, broken no policy and thrown nothing."""
    context = chromium.new_context(**({"viewport": {"width": 1200, "height": 800}} | options))
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda request: faults.extend(_elsewhere(request.url, live)))
    page.add_init_script(VIOLATIONS + ";" + script)
    page.set_default_timeout(15_000)
    page.goto(live.url + path)
    yield page
    assert not faults, faults
    assert page.evaluate("window.violations ?? []") == []
    context.close()


def _elsewhere(url: str, live: Live) -> list[str]:
    return [] if url.startswith((live.url, "data:image/", f"blob:{live.url}")) else [f"request: {url}"]


def wait_until(page: Any, expression: str) -> None:
    """Wait until an expression is true; `wait_for_function` would need a policy that allows eval."""
    deadline = time.monotonic() + 15
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never true: {expression}"
        page.wait_for_timeout(20)


def attach(page: Any, *files: tuple[str, str, bytes]) -> None:
    """Choose files: names, types, contents."""
    page.set_input_files("#file", [{"name": n, "mimeType": kind, "buffer": data} for n, kind, data in files])


def ask(page: Any, text: str) -> None:
    """Type a question, send it, and wait for the end of its answer."""
    turns = page.locator("#turns > li").count()
    page.fill("#question", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#turns > li:nth-child({turns + 2}) .actions")
    page.wait_for_selector("#send:visible")


def scripted(page: Any, *chunks: dict[str, Any], done: bool = True) -> None:
    """Let the next answers be these chunks' deltas."""
    frames = [{"model": "nano", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in chunks]
    body = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames) + "data: [DONE]\n\n" * done
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, headers={"Content-Type": "text/event-stream"}, body=body),
    )


def box(label: str, corners: list[int], start: int, score: float | None = 0.9, image: int | None = 0) -> dict[str, Any]:
    """A box as the API has it, whose tag begins at a character of the text."""
    shape = {"label": label, "box": corners, "quad": None, "score": score, "image_index": image, "pixels": None}
    return {**shape, "span": [start, start + 10]}


def rectangles(page: Any, selector: str) -> list[list[float]]:
    """Left, top, right and bottom of elements on the grid of the picture, 0 to 1000."""
    found: list[list[float]] = page.evaluate(
        """selector => {
          const frame = document.querySelector("#image").getBoundingClientRect();
          return [...document.querySelectorAll(selector)].map(element => {
            const { left, top, right, bottom } = element.getBoundingClientRect();
            return [(left - frame.left) / frame.width, (top - frame.top) / frame.height,
                    (right - frame.left) / frame.width, (bottom - frame.top) / frame.height].map(n => 1000 * n);
          });
        }""",
        selector,
    )
    return found


def serious(page: Any) -> list[str]:
    """What axe finds serious or critical."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm install --prefix build/npm axe-core@4.14.1")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run().then(result => result.violations)")
    return [
        f"{violation['id']}: {violation['nodes'][0]['html'][:120]} {violation['nodes'][0].get('failureSummary', '')}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]
