"""Which images are decoded at the same time: small ones soon, and large or slow ones by twos, so that none waits long.

A lane bounds how many images are in it and how many pixels they have together, and so the memory of the workers. Who
waits for a lane enters it in the order of arrival.
"""

from __future__ import annotations

import threading
from collections import deque

from qvl_runtime.prompt.cancellation import Cancellation


class Lane:
    """A bounded number of images with a bounded number of pixels, or one image alone, whatever its size."""

    def __init__(self, max_images: int, max_pixels: int) -> None:
        self._max_images, self._max_pixels = max_images, max_pixels
        self._images = self._pixels = 0
        self._lock = threading.Lock()
        self._waiting: deque[threading.Condition] = deque()  # one each: who enters wakes the next one alone

    def enter(self, pixels: int, cancellation: Cancellation) -> None:
        """Wait until the image may enter. Raises `Canceled`."""
        place = threading.Condition(self._lock)
        with self._lock:
            self._waiting.append(place)
        entered = False

        def wake() -> None:
            with self._lock:
                place.notify()

        try:
            with cancellation.ending_with(wake), self._lock:
                while not cancellation.is_set and not (self._waiting[0] is place and self._has_room(pixels)):
                    place.wait()
                if not cancellation.is_set:
                    self._add(pixels)
                    entered = True
        except BaseException:
            if entered:
                self.leave(pixels)
            raise
        finally:
            with self._lock:
                self._waiting.remove(place)
                self._wake_first()

    def try_enter(self, pixels: int) -> bool:
        """Enter if that is possible at once, and no one waits."""
        with self._lock:
            if self._waiting or not self._has_room(pixels):
                return False
            self._add(pixels)
            return True

    def leave(self, pixels: int) -> None:
        """Make room for others."""
        with self._lock:
            self._images -= 1
            self._pixels -= pixels
            self._wake_first()

    def _has_room(self, pixels: int) -> bool:
        fits = self._images < self._max_images and self._pixels + pixels <= self._max_pixels
        return fits or self._images == 0

    def _add(self, pixels: int) -> None:
        self._images += 1
        self._pixels += pixels

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].notify()
