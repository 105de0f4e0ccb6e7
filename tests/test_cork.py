"""Requests of one turn of the event loop are sent together."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from chatkore_async import AsyncChatKore
from chatkore_async._cork import FEW, MOST_HELD, Cork, bare
from chatkore_async._slots import Slots
from chatkore_async.testing import ChatKoreServer

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


class Loop:
    """A loop whose turns end when the test says so."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def end_turn(self) -> None:
        soon, self.soon = self.soon, []
        for callback in soon:
            callback()


class Wire(asyncio.Transport):
    """Notes down what is done to it, in the order of all wires."""

    def __init__(self, name: str, done: list[tuple[str, object]]) -> None:
        super().__init__({"peername": name})
        self.name = name
        self.done = done
        self.closing = False
        self.paused = False
        self.protocol: Any = None
        self.limits = (1, 2)
        self.own = "of this kind of transport only"

    def write(self, data: object) -> None:
        assert type(data) in (bytes, bytearray), "what the caller may change is not kept"
        self.done.append((self.name, data))

    def close(self) -> None:
        self.done.append((self.name, "closed"))

    def abort(self) -> None:
        self.done.append((self.name, "aborted"))

    def write_eof(self) -> None:
        self.done.append((self.name, "ended"))

    def get_write_buffer_size(self) -> int:
        return 7

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_reading(self) -> bool:
        return not self.paused

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def can_write_eof(self) -> bool:
        return True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.limits = (low or 0, high or 0)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self.limits


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def done() -> list[tuple[str, object]]:
    return []


@pytest.fixture
def corked(loop: Loop, done: list[tuple[str, object]]) -> Callable[[str], Any]:
    slots = Slots(None)
    slots.in_use = FEW + 1
    cork = Cork(loop, slots)  # type: ignore[arg-type]

    def make(name: str) -> Any:
        protocol = SimpleNamespace(transport=Wire(name, done))
        cork.put_on(protocol)
        return protocol.transport

    return make


def test_what_is_written_in_one_turn_goes_out_at_its_end(
    loop: Loop, done: list[tuple[str, object]], corked: Callable[[str], Any]
) -> None:
    """In the order in which the connections were written to first, each in one piece, with one callback for all."""
    first, second = corked("first"), corked("second")
    first.write(b"a")
    second.write(memoryview(b"b"))
    first.writelines([b"c", bytearray(b"d")])
    first.write(b"")
    assert (done, len(loop.soon)) == ([], 1)
    loop.end_turn()
    assert done == [("first", b"acd"), ("second", b"b")]
    second.write(b"e")
    loop.end_turn()
    assert done[2:] == [("second", b"e")]
    loop.end_turn()
    assert len(done) == 3


def test_what_the_caller_changes_later_went_out_as_it_was(
    loop: Loop, done: list[tuple[str, object]], corked: Callable[[str], Any]
) -> None:
    """A buffer may be filled anew as soon as it was written, as with any transport."""
    wire, buffer = corked("wire"), bytearray(b"old")
    wire.write(buffer)
    buffer[:] = b"new"
    loop.end_turn()
    assert done == [("wire", b"old")]


def test_nothing_large_is_held_back(loop: Loop, done: list[tuple[str, object]], corked: Callable[[str], Any]) -> None:
    """Its writer would be told to wait for the network only when all of it is in memory."""
    wire, large = corked("wire"), b"x" * (MOST_HELD + 1)
    wire.write(large)
    assert done == [("wire", large)]
    wire.write(b"head")
    wire.write(large)
    assert done[1:] == [("wire", b"head" + large)]
    loop.end_turn()
    assert len(done) == 2


@pytest.mark.parametrize(
    "end,left", [("close", [b"held", "closed"]), ("write_eof", [b"held", "ended"]), ("abort", ["aborted"])]
)
def test_the_end_of_a_connection_comes_after_what_is_held(
    loop: Loop, done: list[tuple[str, object]], corked: Callable[[str], Any], end: str, left: list[object]
) -> None:
    """Closing sends what was written before; aborting does not."""
    wire = corked("wire")
    wire.write(b"held")
    assert wire.get_write_buffer_size() == 4 + 7
    getattr(wire, end)()
    loop.end_turn()
    assert done == [("wire", each) for each in left]


def test_a_connection_that_is_lost_takes_no_other_with_it(
    loop: Loop, done: list[tuple[str, object]], corked: Callable[[str], Any]
) -> None:
    """Some loops raise when a closed transport is written to."""
    lost, other = corked("lost"), corked("other")
    lost.write(b"a")
    other.write(b"b")
    lost.bare.closing = True
    loop.end_turn()
    assert done == [("other", b"b")]


@pytest.mark.parametrize("error", [RuntimeError("the handler is closed"), OSError("gone")])
def test_a_connection_that_cannot_be_written_to_is_given_up(
    loop: Loop, done: list[tuple[str, object]], corked: Callable[[str], Any], error: Exception
) -> None:
    """Whoever waits for its answer is told that it is lost, and the others get theirs."""

    def fail(_: object) -> None:
        raise error

    broken, other = corked("broken"), corked("other")
    broken.bare.write = fail
    broken.write(b"a")
    other.write(b"b")
    loop.end_turn()
    assert done == [("broken", "aborted"), ("other", b"b")]


def test_all_else_is_the_transports_own(corked: Callable[[str], Any]) -> None:
    """Who looks at the connection sees the one below."""
    wire, protocol = corked("wire"), asyncio.Protocol()
    wire.pause_reading()
    assert not wire.is_reading()
    wire.resume_reading()
    assert wire.is_reading()
    wire.set_protocol(protocol)
    assert wire.get_protocol() is protocol
    wire.set_write_buffer_limits(high=9, low=3)
    assert wire.get_write_buffer_limits() == (3, 9)
    assert wire.can_write_eof()
    assert not wire.is_closing()
    assert wire.get_extra_info("peername") == "wire"
    assert wire.get_extra_info("socket", "none") == "none"
    assert wire.own == "of this kind of transport only"
    with pytest.raises(AttributeError):
        _ = wire.unknown
    assert bare(wire) is wire.bare
    assert bare(wire.bare) is wire.bare


def test_a_cork_says_what_it_holds(corked: Callable[[str], Any]) -> None:
    """For whoever debugs a request that does not leave."""
    wire = corked("wire")
    wire.write(b"a")
    assert repr(wire._cork) == "<Cork on 1 connections>"
    assert repr(wire).startswith("<corked <")


def test_nothing_is_held_back_while_there_are_few(
    loop: Loop, done: list[tuple[str, object]], corked: Callable[[str], Any]
) -> None:
    """A call that is alone would wait for nothing but the end of the turn."""
    wire = corked("wire")
    wire._cork._slots.in_use = FEW
    wire.write(b"at once")
    assert (done, loop.soon) == ([("wire", b"at once")], [])


@pytest.mark.parametrize("worthwhile", [True, False])
async def test_calls_that_are_made_together_are_sent_together(
    server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch, worthwhile: bool
) -> None:
    """All requests of one turn of the loop leave in one, where aiohttp would not do so itself; all are answered."""
    monkeypatch.setattr("chatkore_async._transport.WORTHWHILE", worthwhile)
    count = 3 * FEW
    async with AsyncChatKore(api_key="key", base_url=server.base_url) as client:
        create = client.chat.completions.create
        connector = client._manager.pool().connector
        assert connector is not None
        for _ in range(2):  # the first time, connections are opened
            answers = await asyncio.gather(*(create(**ASK) for _ in range(count)))
            assert len(answers) == count
        corked = [bare(each.transport) is not each.transport for each in connector.protocols()]
        assert corked == [worthwhile] * count
    assert len(server.requests) == 2 * count
