"""Addresses from untrusted text: where a URL may lead, at each redirect (FAULTS H3)."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.errors import ConfigError, DownloadError
from qvl_runtime.prompt.addresses import is_public, parse_url
from qvl_runtime.prompt.fetch import fetch
from qvl_runtime.prompt.hosts import canonical, is_allowed
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.limits import ImageLimits
from tests.faults.web_site import LOCAL, serving

pytestmark = pytest.mark.unit
PUBLIC = "93.184.215.14"  # given to names by the fake resolver; nothing here dials it

# Every spelling of loopback and of other private places that FAULTS lists, and some that it does not.
PRIVATE_HOSTS = (
    *("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "[::1]", "localhost"),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "0.0.0.0", "0", "127.255.255.254", "LOCALHOST.", "127.0.0.1."),
    *("169.254.169.254", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.100.100.200"),
    *("[fe80::1]", "[fd00::1]", "[fd00:ec2::254]", "[fec0::1]", "224.0.0.1", "[ff02::1]", "255.255.255.255"),
    *("[64:ff9b::7f00:1]", "[64:ff9b::10.0.0.1]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2001::1]", "[::127.0.0.1]"),
    *("192.0.0.192", "198.18.0.1", "240.0.0.1", "192.0.2.1", "[2001:db8::1]", "168.63.129.16", "[3fff::1]", "[100::1]"),
)
PUBLIC_ADDRESSES = ("1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.63.0.1", "100.128.0.1", "198.17.0.1")
PUBLIC_V6 = ("2606:4700:4700::1111", "2a00:1450:4001::1", "2001:4860:4860::8888", "64:ff9b::8.8.8.8", "::ffff:1.1.1.1")


class Resolver:
    """Answers for names as told, and for IP addresses as the system does."""

    def __init__(self, names: dict[str, tuple[str, ...]]) -> None:
        self.names, self.asked = names, list[str]()
        self._system = socket.getaddrinfo

    def __call__(self, host: str, port: int, **options: Any) -> list[Any]:
        self.asked.append(host)
        if host not in self.names:
            return list(self._system(host, port, **options))
        if not self.names[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [self._system(address, port, **options)[0] for address in self.names[host]]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Resolver]:
    def patch(**names: tuple[str, ...]) -> Resolver:
        resolver = Resolver({name.replace("_", "."): addresses for name, addresses in names.items()})
        monkeypatch.setattr(socket, "getaddrinfo", resolver)
        return resolver

    return patch


@pytest.fixture
def site() -> Iterator[tuple[str, list[str]]]:
    with serving() as started:
        yield started


@pytest.fixture
def not_dialed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("an address was dialed"))


class TestPrivateAddresses:
    @pytest.mark.usefixtures("not_dialed")
    @pytest.mark.parametrize("host", PRIVATE_HOSTS)
    def test_are_refused_before_they_are_dialed(self, host: str) -> None:
        with pytest.raises(DownloadError, match=r"cannot be fetched: its host is unknown, or not at a public address"):
            load_image(f"http://{host}:8080/a.png", 28)

    def test_a_table_of_addresses(self) -> None:
        assert all(map(is_public, (*PUBLIC_ADDRESSES, *PUBLIC_V6)))
        rng = random.Random(0)
        for _ in range(4000):  # never more than the standard library's own table, in any of its versions
            v4, v6 = ipaddress.IPv4Address(rng.getrandbits(32)), ipaddress.IPv6Address(rng.getrandbits(128))
            assert v4.is_global or not is_public(str(v4)), v4
            assert v6.is_global or not is_public(str(v6)), v6
            assert is_public(f"::ffff:{v4}") == is_public(f"64:ff9b::{v4}") == is_public(str(v4))
        assert not is_public("no address") and not is_public("fe80::1%eth0")

    @pytest.mark.usefixtures("not_dialed")
    def test_a_name_with_one_private_address_is_refused_as_one_that_is_unknown(self, resolve: Any) -> None:
        resolve(inside=("10.0.0.8",), mixed=(PUBLIC, "127.0.0.1"), unknown=(), v6=("::1",))
        words = set()
        for host in ("inside", "mixed", "unknown", "v6"):
            with pytest.raises(DownloadError) as caught:
                load_image(f"http://{host}/a.png", 28)
            words.add(str(caught.value).partition("cannot be")[2])
        assert len(words) == 1, "names inside a network are not told from names that do not exist"

    def test_a_name_is_looked_up_once_so_that_a_second_answer_changes_nothing(
        self, resolve: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resolver, dialed = resolve(rebound=(PUBLIC,)), list[Any]()

        def connect(_: socket.socket, address: Any) -> None:
            dialed.append(address)
            resolver.names["rebound"] = ("127.0.0.1",)
            raise ConnectionRefusedError(111, "Connection refused")

        monkeypatch.setattr(socket.socket, "connect", connect)
        with pytest.raises(DownloadError, match="cannot be fetched: Connection refused"):
            load_image("http://rebound/a.png", 28)
        assert dialed == [(PUBLIC, 80)] and resolver.asked == ["rebound"]

    @pytest.mark.parametrize("to", ["http://127.0.0.1:{port}/image", "http://inside/", "//[::1]/", "http://0x7f.1/"])
    def test_redirects_are_checked_like_the_first_address(
        self, site: Any, resolve: Any, to: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        address, paths = site
        port = int(address.rpartition(":")[2])
        resolve(inside=("192.168.0.9",), outside=(PUBLIC,))
        connect = socket.socket.connect
        monkeypatch.setattr(  # what is public is this site, for once
            socket.socket, "connect", lambda s, a: connect(s, ("127.0.0.1", port) if a[0] == PUBLIC else a)
        )
        assert load_image("http://outside/image", 28).width == 40
        assert load_image("http://outside/to/http://outside/image", 28).width == 40
        with pytest.raises(DownloadError, match="its host is unknown, or not at a public address"):
            load_image(f"http://outside/to/{to.format(port=port)}", 28)
        assert len(paths) == 4, "three answers before, the redirect itself, and nothing after"

    def test_they_may_be_allowed(self, site: Any) -> None:
        address, _ = site
        port = address.rpartition(":")[2]
        for host in ("127.0.0.1", "127.1", "localhost", "0x7f000001"):
            assert load_image(f"http://{host}:{port}/to//image", 28, LOCAL).width == 40, host
        with pytest.raises(DownloadError, match=r"its host is unknown$"):
            load_image("http://no-such-host.invalid/", 28, LOCAL)


class TestHosts:
    def test_only_named_hosts(self, site: Any, resolve: Any) -> None:
        resolver = resolve(good=("127.0.0.1",), bad=("127.0.0.1",), a_good=("127.0.0.1",))
        address, paths = site
        port = address.rpartition(":")[2]
        limits = ImageLimits(allow_private_addresses=True, allow_urls=("good", "*.other"))
        assert load_image(f"http://GOOD.:{port}/image", 28, limits).width == 40
        for url in (f"http://bad:{port}/image", f"http://good:{port}/to/http://bad:{port}/image", "http://a.good/"):
            with pytest.raises(DownloadError, match="is at a host that is not among those of allow_urls"):
                load_image(url, 28, limits)
        assert resolver.asked == ["good", "good"] and len(paths) == 2, "others are not even looked up"

    @pytest.mark.parametrize(
        ("host", "names", "allowed"),
        [
            ("example.com", ("example.com",), True),
            ("example.com", ("EXAMPLE.com.",), True),
            ("a.example.com", ("example.com",), False),
            ("a.example.com", ("*.example.com",), True),
            ("a.b.example.com", ("*.example.com",), True),
            ("example.com", ("*.example.com",), False),
            ("badexample.com", ("*.example.com",), False),
            ("example.com.evil.org", ("example.com", "*.example.com"), False),
            ("xn--bcher-kva.de", ("bücher.de",), True),
            ("::1", ("[::1]",), True),
            ("example.com", (), False),
            ("example.com", True, True),
            ("example.com", False, False),
        ],
    )
    def test_names(self, host: str, names: Any, allowed: bool) -> None:
        assert is_allowed(host, names) is allowed

    @pytest.mark.parametrize("wrong", ["example.com", ("http://a.com",), ("a.com/x",), ("",), (5,), 1, None, ("a:80",)])
    def test_wrong_lists(self, wrong: Any) -> None:
        for options in (ImageLimits, EngineConfig):
            with pytest.raises(ConfigError, match=r"allow_urls has .*; expected True, False or a tuple of host names"):
                options(allow_urls=wrong)

    @pytest.mark.parametrize(
        "url",
        [
            *("http:///a", "http://", "http://a b/", "http://a\\b/", "http://[::1/", "http://a:port/", "http://a:0/"),
            *("http://a:70000/", "http://%31/", "http://a\x7fb/", "http://" + "a" * 300, "http://" + "a" * 64 + ".com"),
            *("http://-a/", "http://a..b/", "http://[fe80::1%25eth0]/", "http://é\0/", "http://a;b/", "http://a,b/"),
        ],
    )
    @pytest.mark.usefixtures("not_dialed")
    def test_hosts_that_are_none(self, url: str, resolve: Any) -> None:
        resolver = resolve()
        with pytest.raises(DownloadError, match=r"cannot be fetched: it has no valid host and port$"):
            fetch(url, ImageLimits(), "it")
        assert not resolver.asked

    def test_one_spelling_each(self) -> None:
        assert canonical("Bücher.DE.") == "xn--bcher-kva.de" and canonical("[0::1]") == "::1"
        assert parse_url("http://a.com/图 x?q=é#f").path == "/%E5%9B%BE%20x?q=%C3%A9"
        assert parse_url("../c?d", "https://a.com:8443/a/b").url == "https://a.com:8443/c?d"
