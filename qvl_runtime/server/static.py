"""The page at `/`: the files of `web/`, read once, under a strict content security policy."""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path

from starlette.types import Receive, Scope, Send

from qvl_runtime.server.errors import NOT_FOUND, APIError
from qvl_runtime.server.http import Reply

WEB = Path(__file__).parent / "web"
ASSETS = Path(__file__).parents[1] / "assets"
EXAMPLE = {"/example.jpg": ASSETS / "demo.jpg", "/example.json": ASSETS / "demo.json"}
"""What the page offers to try: the image and the prompts of `qvl demo`."""
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, and answered by 304
}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


class StaticFiles:
    """Serves the files of a folder from memory. A path is looked up by its name, so none leads out of the folder."""

    def __init__(self, folder: Path | None = WEB) -> None:
        """folder: None for no files."""
        self._files: dict[str, tuple[bytes, str, str]] = {}  # content, type, entity tag
        if folder is not None and folder.is_dir():
            files = {"/" + file.relative_to(str(folder)).as_posix(): file for file in sorted(folder.rglob("*"))}
            for path, file in {**files, **EXAMPLE}.items():
                if file.is_file():
                    data = file.read_bytes()
                    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
                    self._files[path] = data, _type(file), tag
        if "/index.html" in self._files:
            self._files["/"] = self._files["/index.html"]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the files, and / for the page."""
        return tuple(self._files)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request: GET or HEAD of a file."""
        reply = Reply(send)
        found = self._files.get(scope["path"])
        if found is None:
            await reply.error(APIError(404, "there is nothing at this path", NOT_FOUND, None, "not_found"))
        elif scope["method"] not in ("GET", "HEAD"):
            headers = {"Allow": "GET, HEAD"}
            await reply.error(APIError(405, "this path is for GET", code="method_not_allowed", headers=headers))
        else:
            data, kind, tag = found
            known = dict(scope["headers"]).get(b"if-none-match", b"").decode("latin-1")
            headers = {**_HEADERS, "ETag": tag}
            if known == tag:
                await reply.data(304, b"", kind, headers)
            else:
                await reply.data(200, data, kind, headers, head=scope["method"] == "HEAD")


def _type(file: Path) -> str:
    kind = _TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
