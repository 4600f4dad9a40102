"""Hooks of the documentation site: pages that live outside docs/ are part of it, and links between both work.

README.md becomes the start page. A page outside docs/ keeps its path, and so does every file that a page links to.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README_zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE",
         "examples/README.md", "benchmarks/README.md")  # fmt: skip
LINK = re.compile(r"(\]\()([^)#\s:]+)([)#])")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages outside docs/, and what pages link to: other pages, pictures, scripts, results."""
    queue = [*PAGES]
    for page in files.documentation_pages():
        queue += linked(f"docs/{page.src_uri}")
    known = {file.src_uri for file in files}
    while queue:
        path = queue.pop()
        uri = site_path(path)
        if uri in known or not (ROOT / path).is_file():
            continue
        known.add(uri)
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            queue += linked(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page to where their targets are on the site."""
    source = repository_path(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = resolve(source, link[2])
        if not (ROOT / target).exists():
            return link[0]
        to = posixpath.relpath(site_path(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{link[1]}{to}{link[3]}"

    return LINK.sub(moved, markdown)


def linked(page: str) -> list[str]:
    """The files of the repository that a page links to, as paths from its root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [resolve(page, link[2]) for link in LINK.finditer(text)]


def resolve(page: str, link: str) -> str:
    """Return the path from the repository's root that a page's link means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def site_path(path: str) -> str:
    """Where a file of the repository is on the site: docs/ is the site's root, README.md its start."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def repository_path(uri: str) -> str:
    """The way back from a path on the site."""
    if uri == "index.md":
        return "README.md"
    return f"docs/{uri}" if (ROOT / "docs" / uri).is_file() else uri
