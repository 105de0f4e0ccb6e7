"""Requests of one turn of the event loop are sent together, at its end.

Sending each as it is made costs more than it seems to: between the work on two calls the kernel is entered and a
sleeping peer woken, on a virtual machine by way of its host, and the caches are no longer what they were. To send them
one after another takes a tenth off each of 64 calls. A call that is alone would only wait for one more turn, so nothing
is held back while there are few.

Before Python 3.12 there is no need: aiohttp writes each request in a task of its own, and these have their turns one
after another. Since then such a task begins in the step that makes it.
"""

import asyncio
import sys
from collections.abc import Iterable
from typing import Any, Final

from ._slots import Slots

WORTHWHILE: Final = sys.version_info >= (3, 12)

FEW: Final = 8
"""Requests under way up to which nothing is held back. With so many it makes no difference."""

MOST_HELD: Final = 64 * 1024
"""Bytes of a connection that are held back. More go out at once, so that the network holds their writer back."""


class Cork:
    """Holds back what is written in one turn of the event loop to the connections that it is put on.

    Args:
        loop: the event loop.
        slots: tells how many requests are under way.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, slots: Slots) -> None:
        self._loop = loop
        self._slots = slots
        self._waiting: list[_CorkedTransport] = []

    def __repr__(self) -> str:
        return f"<Cork on {len(self._waiting)} connections>"

    def put_on(self, protocol: Any) -> None:
        """Have a protocol write through this."""
        protocol.transport = _CorkedTransport(protocol.transport, self)

    def holds(self, transport: "_CorkedTransport") -> bool:
        """See to it that a connection is flushed at the end of this turn, unless it is not to wait for that."""
        if self._slots.in_use <= FEW:
            return False
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(transport)
        return True

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport in waiting:
            transport.flush()


class _CorkedTransport(asyncio.Transport):
    """A transport that writes at the end of the loop's turn; all else goes straight to the one below."""

    __slots__ = ("_cork", "_held", "bare")

    def __init__(self, transport: asyncio.Transport, cork: Cork) -> None:
        self.bare = transport
        self._cork = cork
        self._held = b""

    def __repr__(self) -> str:
        return f"<corked {self.bare!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bare, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._held:
            self._held += data
            if len(self._held) > MOST_HELD:
                self.flush()
        elif data and len(data) <= MOST_HELD and self._cork.holds(self):
            self._held = bytes(data)
        else:
            self.bare.write(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def flush(self) -> None:
        """Write what is held. To a connection that was lost meanwhile nothing is: its protocol was told."""
        held, self._held = self._held, b""
        if held and not self.bare.is_closing():
            try:
                self.bare.write(held)
            except (OSError, RuntimeError):  # aiohttp cannot be told any more that it failed, but that it is over
                self.bare.abort()

    def close(self) -> None:
        self.flush()
        self.bare.close()

    def abort(self) -> None:
        self._held = b""
        self.bare.abort()

    def write_eof(self) -> None:
        self.flush()
        self.bare.write_eof()

    def get_write_buffer_size(self) -> int:
        return len(self._held) + self.bare.get_write_buffer_size()

    # The base class has these, so that `__getattr__` is not asked.

    def is_closing(self) -> bool:
        return self.bare.is_closing()

    def pause_reading(self) -> None:
        self.bare.pause_reading()

    def resume_reading(self) -> None:
        self.bare.resume_reading()

    def is_reading(self) -> bool:
        return self.bare.is_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.bare.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.bare.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.bare.get_protocol()

    def can_write_eof(self) -> bool:
        return self.bare.can_write_eof()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.bare.set_write_buffer_limits(high, low)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self.bare.get_write_buffer_limits()


def bare(transport: Any) -> Any:
    """Return a transport without a cork on it."""
    return transport.bare if isinstance(transport, _CorkedTransport) else transport
