"""Find an installed font that has the glyphs of a label, when first needed; nothing is downloaded."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qvl_runtime.errors import ConfigError
from qvl_runtime.reading.regular_files import open_regular

if TYPE_CHECKING:
    from PIL import ImageFont

Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"

INSTALL_HINT = "install one (Debian and Ubuntu: apt install fonts-noto-cjk)"

# File names, best first: fonts that cover Chinese in a plain upright style, then ones for other scripts.
_PREFERRED = (
    r"NotoSansCJK.*Regular|NotoSansCJKsc-Regular|NotoSansSC[-\[]",
    r"SourceHanSans.*Regular|SourceHanSansSC-Regular",
    r"wqy-microhei|wqy-zenhei",
    r"PingFang|Hiragino Sans GB|STHeiti Medium|STHeiti Light",
    r"msyh\.|Deng\.|simhei|simsun",
    r"DroidSansFallback|Arial Unicode|ArialUnicode|HarmonyOS_Sans_SC_Regular|AlibabaPuHuiTi.*Regular",
    r"NotoSerifCJK.*Regular|uming|ukai|gkai|gbsn",
    r"DejaVuSans\.|NotoSans-Regular|arial\.|Helvetica\.",
)
_SUFFIXES = (".ttf", ".ttc", ".otf")
_SIMPLIFIED = re.compile(r"\b(SC|CN|GB)\b")
_NO_CHARACTER = "\U0010ffff"  # in no font, so it renders as the missing-glyph box


def pick_font(text: str, size: int) -> tuple[Font, str]:
    """A font for a text at a size in pixels, and the characters of the text that it lacks (ideally none).

    Pillow's built-in font is used for plain Latin text; otherwise the installed font that lacks the fewest characters.
    """
    from PIL import ImageFont

    best: Font = ImageFont.load_default(size)
    missing = missing_glyphs(best, text)
    for path in installed_fonts() if missing else ():
        try:
            font = open_font(path, size)
        except ConfigError:
            continue
        if len(still_missing := missing_glyphs(font, text)) < len(missing):
            best, missing = font, still_missing
        if not missing:
            break
    return best, missing


def open_font(path: str | os.PathLike[str], size: int) -> ImageFont.FreeTypeFont:
    """Open a font file at a size in pixels; of a collection, the face with simplified Chinese forms if there is one.

    Raises `ConfigError` if the file cannot be opened, or is none.
    """
    from PIL import ImageFont

    if os.path.exists(path):  # otherwise it may be the name of an installed font
        open_regular(Path(path), ConfigError).close()
    faces: list[ImageFont.FreeTypeFont] = []
    try:
        while len(faces) < (16 if str(path).lower().endswith((".ttc", ".otc")) else 1):
            faces.append(ImageFont.truetype(os.fspath(path), size, index=len(faces)))
    except OSError as error:  # also raised at the end of a collection
        if not faces:
            raise ConfigError(f"font {os.fspath(path)} cannot be opened: {error}") from error
    return next((face for face in faces if _SIMPLIFIED.search(str(face.getname()[0]))), faces[0])


def missing_glyphs(font: Font, text: str) -> str:
    """The characters of a text, in order, that a font renders as its missing-glyph box."""
    box = bytes(font.getmask(_NO_CHARACTER))
    visible = dict.fromkeys(char for char in text if unicodedata.category(char)[0] in "LNPS")
    return "".join(char for char in visible if bytes(font.getmask(char)) == box)


@lru_cache(maxsize=1)
def installed_fonts() -> tuple[Path, ...]:
    """The preferred fonts that are installed, best first; searched once per process."""
    ranked = []
    for path in _font_files():
        rank = next((rank for rank, names in enumerate(_PREFERRED) if re.match(names, path.name, re.IGNORECASE)), None)
        if rank is not None:
            ranked.append((rank, str(path)))
    return tuple(Path(name) for _, name in sorted(ranked))


def _font_files() -> Iterator[Path]:
    for folder in _font_folders():
        for where, _, names in os.walk(folder):
            yield from (Path(where, name) for name in names if name.lower().endswith(_SUFFIXES))


def _font_folders() -> list[Path]:
    home = Path.home()
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", home / "AppData/Local"))
        return [Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"), local / "Microsoft/Windows/Fonts"]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    data = Path(os.environ.get("XDG_DATA_HOME", home / ".local/share"))
    return [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), data / "fonts", home / ".fonts"]
