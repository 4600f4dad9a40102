"""Which server gets which request."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl_runtime.cluster.affinity import HEADER, affinity_headers, affinity_key, choose, preference

pytestmark = pytest.mark.unit
URL = "data:image/png;base64,AAAA"
KEY = hashlib.sha256(URL.encode()).hexdigest()


def parts(*urls: str) -> list[dict[str, object]]:
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


@pytest.mark.parametrize(
    "request_body",
    [
        {"messages": [{"role": "user", "content": parts(URL)}]},
        {"messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": parts(URL, "b")}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": URL}]}]},
        {"prompt": f"Picture 1: <img>{URL}</img>\nWhat is this?"},
        {"prompt": [f"<img>{URL}</img>Describe it:", "<img>other</img>"]},
    ],
)
def test_requests_that_begin_with_the_same_picture_have_the_same_key(request_body: dict[str, object]) -> None:
    assert affinity_key(request_body) == KEY


@pytest.mark.parametrize(
    "request_body",
    [
        {},
        {"messages": None},
        {"messages": "hello"},
        {"messages": [None, 1, {"content": "text"}, {"content": [None, {"type": "image_url", "image_url": {}}]}]},
        {"prompt": [1, 2, 3]},
        {"prompt": []},
        {"prompt": "<img>not closed"},
    ],
)
def test_requests_without_a_picture_have_no_key_and_bad_ones_no_error(request_body: dict[str, object]) -> None:
    assert affinity_key(request_body) is None


def test_headers_are_for_the_clients_that_send_them() -> None:
    assert affinity_headers([{"role": "user", "content": parts(URL)}]) == {HEADER: KEY}
    assert affinity_headers([{"role": "user", "content": "Hello"}]) == {}
    assert affinity_key({"messages": [{"role": "user", "content": parts("\ud800")}]})  # a lone surrogate is JSON


def test_keys_spread_evenly_and_stay_when_a_server_leaves() -> None:
    names, keys = [f"s{i}" for i in range(5)], [str(i) for i in range(2000)]
    first = {key: preference(key, names)[0] for key in keys}
    assert all(300 < count < 500 for count in Counter(first.values()).values())
    rest = [name for name in names if name != "s2"]
    moved = [key for key in keys if preference(key, rest)[0] != first[key]]
    assert moved == [key for key in keys if first[key] == "s2"]


def test_a_key_stays_where_it_is_until_the_server_has_too_much() -> None:
    first, second = preference("k", ["a", "b"])
    assert choose("k", {"a": 0, "b": 0}) == first
    assert choose("k", {first: 4, second: 4}) == first
    assert choose("k", {first: 12, second: 4}) == second  # the mean is 8.5: at most 11 of 1.25 times that
    assert choose(None, {"a": 3, "b": 2}) == "b"
    with pytest.raises(ValueError, match="no server"):
        choose("k", {})


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300), st.integers(1, 7), st.floats(1, 2))
def test_no_server_has_more_than_the_bound(keys: list[int], servers: int, bound: float) -> None:
    loads = {f"s{i}": 0 for i in range(servers)}
    for number, key in enumerate(keys, 1):
        loads[choose(str(key), loads, bound)] += 1
        assert max(loads.values()) <= bound * number / servers + 1
