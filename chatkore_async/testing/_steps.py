"""What a scripted answer is made of: steps, and the two ways to string them together.

Every fault is a step, so faults compose: a pause in the middle of a header, a cut within the second tool call and a
reset after a ping need no option of their own. Nothing here does I/O.
"""

from typing import Literal, Protocol, TypeAlias

import msgspec

__all__ = ["Cut", "Framing", "Hold", "Pause", "Ping", "Raw", "Reply", "Reset", "Stall", "Step", "Waitable"]


class Waitable(Protocol):
    """Anything with ``await x.wait()``: :class:`asyncio.Event`, ``anyio.Event``, ``asyncio.Barrier``."""

    async def wait(self) -> object:
        """Return when the script may go on."""
        ...


class Pause(msgspec.Struct, frozen=True):
    """Send nothing for so many seconds."""

    seconds: float


class Hold(msgspec.Struct, frozen=True):
    """Send nothing until the test lets go.

    This gives a test its rhythm without sleeping: read the first chunk, look around, ``event.set()``, read the next.
    """

    event: Waitable


class Stall(msgspec.Struct, frozen=True):
    """Send nothing more, and keep the connection open until the client leaves or the server closes."""


class Cut(msgspec.Struct, frozen=True):
    """Close the connection now: what was sent arrives, then comes the end (TCP FIN), with no terminating chunk."""


class Reset(msgspec.Struct, frozen=True):
    """Reset the connection now (TCP RST), as a crashed process or an impatient load balancer does.

    What was sent before goes out first, but what the client has not read by then may be lost, as on any network.
    """


class Ping(msgspec.Struct, frozen=True):
    """Send an SSE comment, as relays do while they wait for their upstream."""

    text: str = "PING"

    def encode(self) -> bytes:
        """Return the comment with the blank line after it."""
        return f": {self.text}\n\n".encode()


Step: TypeAlias = bytes | Pause | Hold | Stall | Cut | Reset | Ping
"""One move of a script; ``bytes`` are sent with one write of their own."""

Framing: TypeAlias = Literal["auto", "length", "chunked", "close"]

_STEPS = (bytes, Pause, Hold, Stall, Cut, Reset, Ping)


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP answer: a status, headers, and the steps that make its body.

    The body is framed by ``framing``:

    * ``"length"``: ``Content-Length``, the number of bytes in all steps;
    * ``"chunked"``: one chunk for each step, and a terminating chunk;
    * ``"close"``: neither; the body ends where the connection does, as with HTTP/1.0 servers;
    * ``"auto"``: ``"length"`` for at most one step, ``"chunked"`` for more.

    A ``Content-Length`` or ``Transfer-Encoding`` among the headers is sent as it is, true or not, and nothing is added.
    ``Connection: close`` among the headers closes the connection after the answer.

    Args:
        status: HTTP status, known or invented.
        headers: Pairs of name and value, sent in this order; a name may come twice.
        steps: The body.
        latency: Seconds between the request and the status line.
        framing: How the client learns where the body ends.

    Raises:
        TypeError: If something in ``steps`` is no step.

    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    steps: tuple[Step, ...] = ()
    latency: float = 0.0
    framing: Framing = "auto"

    def __post_init__(self) -> None:
        _check(self.steps)

    @property
    def body(self) -> bytes:
        """All bytes of the body, whatever waits or breaks in between."""
        return b"".join(_bytes_of(self.steps))

    def header(self, name: str) -> str | None:
        """Return the first value of a header, or ``None``; the case of the name does not matter."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.header('content-type') or 'without content type'}: {_summary(self.steps)}>"


class Raw(msgspec.Struct, frozen=True):
    """Steps that are everything on the wire, status line and headers included.

    The connection is closed after the last step, unless ``keep_alive`` says that the answer was a proper one.

    Raises:
        TypeError: If something in ``steps`` is no step.

    """

    steps: tuple[Step, ...]
    keep_alive: bool = False

    def __post_init__(self) -> None:
        _check(self.steps)

    def __repr__(self) -> str:
        return f"<Raw: {_summary(self.steps)}>"


def _check(steps: tuple[object, ...]) -> None:
    for step in steps:
        if not isinstance(step, _STEPS):
            raise TypeError(f"a step is bytes, Pause, Hold, Stall, Cut, Reset or Ping, not {step!r}")


def _bytes_of(steps: tuple[Step, ...]) -> list[bytes]:
    return [step.encode() if isinstance(step, Ping) else step for step in steps if isinstance(step, bytes | Ping)]


def _summary(steps: tuple[Step, ...]) -> str:
    faults = "".join(f", {type(step).__name__}" for step in steps if isinstance(step, Stall | Cut | Reset))
    return f"{len(steps)} steps, {sum(map(len, _bytes_of(steps)))} bytes{faults}"
