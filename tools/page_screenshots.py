"""Take the pictures of the page in docs/: wide and light, dark, on a phone, in Chinese.

qvl serve --port 8000 &
python -m tools.page_screenshots http://127.0.0.1:8000 docs
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

VIEWS: dict[str, dict[str, Any]] = {
    "page-light": {"viewport": {"width": 1200, "height": 720}},
    "page-dark": {"viewport": {"width": 1200, "height": 720}, "color_scheme": "dark"},
    "page-phone": {"viewport": {"width": 360, "height": 740}},
    "page-chinese": {"viewport": {"width": 1200, "height": 720}, "locale": "zh-CN"},
}


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        print("error: there is no chromium in PATH", file=sys.stderr)
        return 2
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, view in VIEWS.items():
            page = browser.new_page(**view)
            page.goto(f"{options.url}/?example")
            page.wait_for_selector(".assistant .actions")
            page.hover(".assistant button.label >> nth=0")
            page.wait_for_timeout(300)
            taken = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            taken.quantize(96).save(options.folder / f"{name}.png", optimize=True)  # a quarter of the bytes
            print(options.folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
