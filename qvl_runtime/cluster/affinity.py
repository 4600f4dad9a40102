"""Which of several servers gets a request: the one that has its picture already, unless that one is busy.

A server keeps the features of the pictures it has seen, and the keys and values of prompts that begin the same way.
With n servers and requests dealt at random, a picture that comes again finds its features with a probability of 1/n.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

HEADER = "X-Qvl-Affinity"
"""Header of a request that names its affinity key; a proxy hashes on it. Requests with equal keys go together."""

DEFAULT_BOUND = 1.25
_TAG = re.compile(r"<img>(.*?)</img>", re.DOTALL)


def affinity_key(request: Mapping[str, Any]) -> str | None:
    """What requests about the same picture share: the SHA-256 of the first picture's URL; None without a picture.

    request: the JSON of /v1/chat/completions or /v1/completions, which need not be valid. The URL is hashed as it is
    sent, data URLs included, and nothing is decoded: a picture encoded in two ways has two keys. The first picture
    counts, since later turns of a conversation begin with it, too.
    """
    url = first_picture(request)
    return None if url is None else hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def first_picture(request: Mapping[str, Any]) -> str | None:
    """The first picture of a request to the server, or of a line for `qvl batch`, as it is named there."""
    if isinstance(request.get("body"), Mapping):  # in OpenAI's batch form
        request = request["body"]
    images = request.get("images")
    if isinstance(images, list) and images and isinstance(images[0], str):
        return images[0]
    if (url := _first_in_messages(request.get("messages"))) is not None:
        return url
    return _first_in_text(request.get("prompt")) or _first_in_text(request.get("raw"))


def affinity_headers(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The header for a conversation, for the `extra_headers` of OpenAI's client; empty without a picture."""
    key = affinity_key({"messages": messages})
    return {} if key is None else {HEADER: key}


def choose(key: str | None, loads: Mapping[str, int], bound: float = DEFAULT_BOUND) -> str:
    """The server for a request: by its key if it has one, and the least loaded otherwise.

    loads: requests that each server has now, by its name. bound: a server takes at most this multiple of the mean load,
    the new request counted, and passes the others on to the next of the key's own order. So a picture that everybody
    asks about spreads over as many servers as it needs, and servers that come or go move only their own keys
    (rendezvous hashing, Thaler and Ravishankar 1998; bounded loads, Mirrokni et al. 2016). Raises `ValueError` for no
    servers.
    """
    if not loads:
        raise ValueError("there is no server to choose from")
    if key is None:
        return min(loads, key=lambda name: (loads[name], name))
    limit = math.ceil(max(bound, 1.0) * (sum(loads.values()) + 1) / len(loads))
    return next(name for name in preference(key, loads) if loads[name] < limit)


def preference(key: str, names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """All servers, in the order in which a key prefers them."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest())


def _first_in_messages(messages: Any) -> str | None:
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and part.get("type") in ("image_url", "image"):
                value = part.get("image_url", part.get("image"))
                url = value.get("url") if isinstance(value, Mapping) else value
                if isinstance(url, str):
                    return url
    return None


def _first_in_text(prompt: Any) -> str | None:
    """The first picture of a prompt with Qwen's tags; of several prompts, the first one's."""
    text = prompt[0] if isinstance(prompt, (list, tuple)) and prompt else prompt
    found = _TAG.search(text) if isinstance(text, str) else None
    return found[1] if found else None
