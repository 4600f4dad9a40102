"""A cache of image features by content, so that the vision encoder runs once for each image."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class ImageCache:
    """An LRU cache of image features, limited in bytes; the key is the digest of the pixels that the model sees."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, digest: bytes) -> Tensor | None:
        """Return the features [queries, D] of a digest and mark them as used, or None."""
        features = self._features.get(digest)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: Tensor) -> None:
        """Store features, evicting the least recently used; features larger than the limit are not stored."""
        if digest in self._features or features.nbytes > self.max_bytes:
            return
        self._features[digest] = features
        self.bytes += features.nbytes
        while self.bytes > self.max_bytes:
            _, evicted = self._features.popitem(last=False)
            self.bytes -= evicted.nbytes

    def __len__(self) -> int:
        return len(self._features)
