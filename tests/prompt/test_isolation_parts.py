"""The parts of decoding in processes: lanes, the channel to a worker, and cancellation."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from qvl_runtime.prompt.cancellation import Canceled, Cancellation
from qvl_runtime.prompt.isolation.lanes import Lane
from qvl_runtime.prompt.isolation.messages import Channel, Disconnected
from qvl_runtime.prompt.isolation.pool import shared_pool

pytestmark = pytest.mark.unit


class TestLane:
    def test_images_and_pixels_are_bounded(self) -> None:
        lane = Lane(3, 100)
        assert lane.try_enter(60) and not lane.try_enter(60) and lane.try_enter(40)
        assert not lane.try_enter(1)
        lane.leave(40)
        assert lane.try_enter(0) and lane.try_enter(0) and not lane.try_enter(0)

    def test_one_alone_may_have_any_size(self) -> None:
        lane = Lane(3, 100)
        assert lane.try_enter(1000) and not lane.try_enter(0)

    def test_who_waits_enters_in_order(self) -> None:
        lane, order = Lane(1, 100), list[int]()
        lane.enter(50, Cancellation())

        def work(number: int) -> None:
            lane.enter(10 * number, Cancellation())
            order.append(number)
            lane.leave(10 * number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        assert not order and not lane.try_enter(0)
        lane.leave(50)
        for thread in threads:
            thread.join()
        assert order == [0, 1, 2, 3, 4] and lane.try_enter(100)

    def test_one_that_is_canceled_leaves_the_queue(self) -> None:
        lane, first, outcome = Lane(1, 100), Cancellation(), list[str]()
        lane.enter(0, Cancellation())

        def work(name: str, cancellation: Cancellation) -> None:
            try:
                lane.enter(0, cancellation)
                outcome.append(name)
            except Canceled:
                outcome.append(f"{name} canceled")

        threads = [threading.Thread(target=work, args=("first", first))]
        threads.append(threading.Thread(target=work, args=("second", Cancellation())))
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        first.cancel()
        threads[0].join(5)
        assert outcome == ["first canceled"]
        lane.leave(0)
        threads[1].join(5)
        assert outcome == ["first canceled", "second"]


class TestChannel:
    @pytest.fixture
    def ends(self) -> Iterator[tuple[Channel, socket.socket]]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield Channel(ours), theirs

    def test_round_trip(self, ends: tuple[Channel, socket.socket]) -> None:
        channel, theirs = ends
        Channel(theirs).send({"a": "ü"}, b"12", memoryview(b"345"))
        assert channel.receive() == {"a": "ü"} and channel.receive_bytes(5) == b"12345"

    @pytest.mark.parametrize(
        "sent",
        [
            *(b"", b"\0\0", struct.pack("!I", 5) + b"{", struct.pack("!I", 2**31), struct.pack("!I", 4) + b"null"),
            *(struct.pack("!I", 3) + b"\xff\xff\xff", struct.pack("!I", 60_000) + b"[" * 60_000),
        ],
    )
    def test_what_is_no_message(self, ends: tuple[Channel, socket.socket], sent: bytes) -> None:
        channel, theirs = ends
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(Disconnected):
            channel.receive()

    def test_deadline(self, ends: tuple[Channel, socket.socket]) -> None:
        channel, theirs = ends
        channel.deadline = time.monotonic() + 0.05
        theirs.sendall(b"\0")
        with pytest.raises(TimeoutError):
            channel.receive()
        with pytest.raises(TimeoutError):
            channel.send_bytes(b"x")


class TestCancellation:
    def test_ends_the_innermost_wait(self) -> None:
        cancellation, ended = Cancellation(), list[str]()
        with pytest.raises(Canceled), cancellation.ending_with(lambda: ended.append("outer")):
            with cancellation.ending_with(lambda: ended.append("done")):
                pass
            with cancellation.ending_with(lambda: ended.append("inner")):
                cancellation.cancel()
                raise ValueError
        assert ended == ["inner"]
        for body in (cancellation.check, lambda: cancellation.ending_with(lambda: None).__enter__()):
            with pytest.raises(Canceled):
                body()


def test_the_shared_pool_is_one() -> None:
    assert shared_pool() is shared_pool()
