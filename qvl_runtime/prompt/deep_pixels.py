"""Bring pixels of more than 8 bits to 8 bits: PIL's modes I;16, I and F, and arrays of other types than uint8.

PIL's own conversion clips at 255, which shows a 16-bit image white, and a float one from 0 to 1 black. Here white is
the type's largest value (1.0 for floats), and an image that would be nearly one shade is refused, such as an X-ray of
12 bits stored in 16. docs/departures.md describes the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from qvl_runtime.errors import ImageError
from qvl_runtime.prompt.limits import ImageLimits

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Pixels: TypeAlias = np.ndarray[Any, Any]
    Rows: TypeAlias = Callable[[int, int], Pixels]  # the rows from one to before another

MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""PIL's modes of more than 8 bits."""

_STRIP = 2**20  # values that are converted at a time: a copy of the whole in float64 would take 8 times the image
_USED = 1 / 4  # of the range: less is refused. 14 bits stored in 16 are just below
_WAYS_OUT = "convert it to 8 bits with the range that you want, or set deep_pixels to 'stretch'"


def narrow_image(image: Image.Image, limits: ImageLimits, described: str) -> Image.Image:
    """An image of one of `MODES` in mode L. Raises `ImageError`, see `narrow`."""
    import numpy as np
    from PIL import Image

    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF file
    top: float | None = 65535
    name = "float pixels" if image.mode == "F" else "16-bit pixels"
    if image.mode == "F":
        top = 1.0
    elif image.mode == "I":  # 32 bits, but PIL opens PGM files so, and its versions before 10.3 16-bit PNG files
        if getattr(image, "format", None) not in ("PNG", "PPM"):
            top, name = None, "32-bit integer pixels"
    elif tags.get(258) == (12,):  # BitsPerSample
        top = 4095

    def rows(start: int, stop: int) -> Pixels:
        return np.asarray(image.crop((0, start, image.width, stop)))

    values = narrow(rows, (image.height, image.width), top, name, limits, described)
    if tags.get(262) == 0:  # PhotometricInterpretation WhiteIsZero, which PIL heeds in 8 bits only
        np.subtract(255, values, out=values)
    return Image.fromarray(values)


def narrow_array(array: Pixels, limits: ImageLimits, described: str) -> Pixels:
    """An array [H, W], [H, W, 3] or [H, W, 4] as uint8; uint8 itself is returned. Raises `ImageError`, see `narrow`."""
    import numpy as np

    kind, dtype = array.dtype.kind, array.dtype.newbyteorder("=")
    if dtype == np.uint8:
        return array
    if kind == "b":
        white: Pixels = np.where(array, np.uint8(255), np.uint8(0))
        return white
    if kind not in "uif":
        raise ImageError(f"{described} holds {dtype}; expected uint8, uint16, or floats from 0 to 1")
    top = 1.0 if kind == "f" else 65535 if dtype == np.uint16 else None
    if array.ndim < 3 or array.shape[2] < 4:
        return narrow(lambda start, stop: array[start:stop], array.shape, top, str(dtype), limits, described)
    if top is None:
        raise ImageError(f"{described} holds {dtype} with alpha, whose range is unknown; expected uint8 or uint16")
    color, alpha = array[:, :, :3], array[:, :, 3]
    narrowed = np.empty(array.shape, np.uint8)
    narrowed[:, :, :3] = narrow(lambda start, stop: color[start:stop], color.shape, top, str(dtype), limits, described)
    clipped = np.clip(np.nan_to_num(alpha), 0, top)  # an alpha channel may be all of one value: it has its range
    narrowed[:, :, 3] = clipped.astype(np.float64) * (255 / top) + 0.5
    return narrowed


def narrow(
    rows: Rows, shape: tuple[int, ...], top: float | None, name: str, limits: ImageLimits, described: str
) -> Pixels:
    """Values as uint8 [shape], read by `rows` in strips; `top` is white, None if that is unknown; `name`: of the type.

    Integers are divided so that their high bits stay, as PIL reads 16-bit color; floats are rounded. Raises
    `ImageError` for NaN and infinity and, unless `deep_pixels` is "stretch", for values outside 0 to `top`, for values
    that use less than a quarter of it, and where it is unknown.
    """
    import numpy as np

    step = max(1, _STRIP // math.prod(shape[1:]))
    strips = [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
    low = np.min([rows(start, stop).min() for start, stop in strips]).item()  # NaN if one of them is
    high = np.max([rows(start, stop).max() for start, stop in strips]).item()
    stretch = limits.deep_pixels == "stretch"
    check_range(low, high, top, name, stretch, described)
    narrowed = np.empty(shape, np.uint8)
    for start, stop in strips:
        values = rows(start, stop)
        if stretch:
            values = (values.astype(np.float64) - low) * (255 / (high - low or 1)) + 0.5
        elif isinstance(top, int):
            values = values.astype(np.int64) * 256 // (top + 1)
        else:
            values = values.astype(np.float64) * 255 + 0.5
        narrowed[start:stop] = values
    return narrowed


def check_range(low: float, high: float, top: float | None, name: str, stretch: bool, described: str) -> None:
    """Raise `ImageError` for values from `low` to `high` that cannot be shown, where `top` is white (None: unknown)."""
    found = f"{described} holds {name} from {low:,.6g} to {high:,.6g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(f"{described} holds {name} that are not finite (NaN or infinity): replace them")
    if stretch:
        return
    if top is None:
        raise ImageError(f"{found}, and which value is white is not known: {_WAYS_OUT}")
    if low < 0 or high > top:
        raise ImageError(f"{found}; expected 0 to {top:g}: {_WAYS_OUT}")
    if low < high < low + _USED * top:
        raise ImageError(f"{found}, less than a quarter of 0 to {top:,g}, so it would be nearly one shade: {_WAYS_OUT}")
