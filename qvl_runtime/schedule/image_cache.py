"""Image features by content, so that the vision encoder runs once for each image."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class ImageCache:
    """Least recently used features under a cap in bytes; the key is the digest of the pixels the model sees."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, digest: bytes) -> Tensor | None:
        """Features [queries, D], or None; counts as a use."""
        features = self._features.get(digest)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: Tensor) -> None:
        """Keep features, dropping the least recently used ones over the cap; what is over it alone is not kept."""
        if digest in self._features or features.nbytes > self.max_bytes:
            return
        self._features[digest] = features
        self.bytes += features.nbytes
        while self.bytes > self.max_bytes:
            _, dropped = self._features.popitem(last=False)
            self.bytes -= dropped.nbytes

    def __len__(self) -> int:
        return len(self._features)
