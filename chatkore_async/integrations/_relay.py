"""One stream on its way to one reader, whatever framework the reader is connected to.

The reader's side can end at any moment, the model's side too, and both may stand still. What happens then is decided
here, once:

- the reader leaves: the stream is left in the same step, whatever is being waited for;
- the model is silent: after `heartbeat` seconds a comment is written, so that proxies keep the connection;
- the reader does not read: nothing is taken from the stream meanwhile, and after `send_timeout` seconds it is left;
- the service shuts down: the stream may go on for a while, and ends with an error event.

A delta costs a write and two looks at the clock, and a stream that waits holds neither its request nor its last delta.
There is one timer for each.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from chatkore_async import APIError, ChatKoreError, ChatStream, ConfigurationError
from chatkore_async.integrations._refusals import SHUTTING_DOWN, Refusal, refusal

__all__ = ["HEADERS", "Relay", "Relays", "Write"]

Write: TypeAlias = Callable[[bytes], Awaitable[object]]
"""Sends bytes of the body to the reader, and waits while the reader is slower than we are. `OSError`: it has left."""

HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would gather events before it sends any
}

_COMMENT: Final = b": waiting for the model\n\n"
_DONE: Final = b"data: [DONE]\n\n"

logger = logging.getLogger("chatkore_async")


class Relay:
    """Relays a stream: `begin` waits for it, `run` writes it.

    Args:
        stream: what is relayed; it may have been opened, and read from.
        heartbeat: seconds of silence after which a comment is written; `None` disables it.
        send_timeout: seconds that a write may take, after which the reader is given up; `None` disables the limit.

    Raises:
        ConfigurationError: one of the two is no time above 0.
    """

    __slots__ = (
        "_comment",
        "_end_timer",
        "_given_up",
        "_heartbeat",
        "_left",
        "_loop",
        "_opening",
        "_period",
        "_refusal",
        "_said_all",
        "_send_timeout",
        "_since",
        "_stream",
        "_task",
        "_timer",
        "_write",
        "_writing",
    )

    def __init__(self, stream: ChatStream, *, heartbeat: float | None, send_timeout: float | None) -> None:
        for name, limit in (("heartbeat", heartbeat), ("send_timeout", send_timeout)):
            if limit is not None and not limit > 0:
                raise ConfigurationError(f"{name} must be seconds above 0, or None for none, not {limit!r}")
        self._stream = stream
        self._heartbeat = heartbeat
        self._send_timeout = send_timeout
        self._period = min(math.inf if limit is None else limit for limit in (heartbeat, send_timeout))
        self._loop = asyncio.get_running_loop()
        self._opening: asyncio.Task[None] | None = None
        self._left = False  # by the reader
        self._refusal: Refusal | None = None  # why the stream was left, when it was not the reader
        self._said_all = False  # to its `[DONE]`, or to the error in place of it
        self._write: Write | None = None
        self._writing = False
        self._since = self._loop.time()  # since when it is as it is: something is being written, or nothing is
        self._comment: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None  # which writes
        self._given_up = False  # whether the reader is, since it takes nothing
        self._end_timer: asyncio.TimerHandle | None = None

    # What may happen meanwhile. All of it is synchronous: who tells us of it has no time to wait.

    @property
    def left(self) -> bool:
        """Whether the reader has left."""
        return self._left

    def reader_left(self) -> None:
        """The reader has left: what is generated now is paid for and read by nobody."""
        self._left = True
        self._leave()

    def end_within(self, seconds: float | None) -> None:
        """The service is shutting down: let the stream go on for so long, and then end it; `None` lets it go on."""
        if seconds is not None and self._end_timer is None:
            self._end_timer = self._loop.call_later(seconds, self.end)

    def end(self) -> None:
        """End the stream with an error event, since the service shuts down."""
        if not self._left:
            self._refusal = SHUTTING_DOWN
            self._leave()

    def last_words(self) -> bytes:
        """Leave the stream, and return the event that tells why, for who cannot wait for `run` to write it.

        Nothing, where `run` wrote an end already.
        """
        self.end()
        return b"" if self._said_all else SHUTTING_DOWN.to_event()

    def _leave(self) -> None:
        with contextlib.suppress(StopIteration):
            self._stream.aclose().send(None)  # it awaits nothing

    def close(self) -> None:
        """Leave nothing behind. Doing so twice is fine."""
        for timer in (self._timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        if self._comment is not None:
            self._comment.cancel()
        self._leave()

    # The way of a stream.

    async def begin(self) -> Refusal | None:
        """Wait for the first delta, but no longer than the heartbeat, and return what to answer in place of a stream.

        Raises:
            RuntimeError: the stream was read to its end before, or is being read elsewhere.
            ConfigurationError: the client is closed.
        """
        if self._stream.completeness is not None:
            raise RuntimeError("this stream was read to its end; make a new one for each response")
        self._opening = self._loop.create_task(self._stream.open())
        self._opening.add_done_callback(_seen)
        try:
            await asyncio.wait((self._opening,), timeout=self._heartbeat)
            refused = await self._opened() if self._opening.done() else None
        except RuntimeError:
            raise  # who reads it may go on
        except BaseException:
            self.close()
            raise
        if refused is not None:
            self.close()
        return refused

    async def _opened(self) -> Refusal | None:
        opening = self._opening
        if opening is None:
            return self._refusal
        await asyncio.wait((opening,))
        self._opening = None  # a task keeps what it ran, which is more than all of this
        try:
            opening.result()
        except APIError as error:
            return _told(error)
        except OSError:  # of a function that gives the key; it does not mean that the reader has left
            logger.exception("a relayed stream could not be opened, its reader is told 502")
            return refusal(ChatKoreError())
        return self._refusal

    async def run(self, write: Write) -> None:
        """Write the stream, to its end or to the reader's.

        Args:
            write: what sends.
        """
        stream, time = self._stream, self._loop.time
        self._write = write
        task = self._task = asyncio.current_task()
        cancelling = 0 if task is None else task.cancelling()
        self._set_timer(math.inf)
        try:
            if self._opening is not None and not self._opening.done():
                await self._beat()
            refused = await self._opened()
            if refused is None:
                try:
                    # Not in a coroutine of its own: each delta would pass through it.
                    async for chunk in stream:
                        # Each line of an event has its field's name. In JSON, line ends are blanks.
                        event = b"data: " + chunk.to_json().replace(b"\r", b"\n").replace(b"\n", b"\ndata: ") + b"\n\n"
                        if self._comment is not None:
                            await self._pause()
                        self._writing = True
                        self._since = time()
                        await write(event)
                        self._writing = False
                        self._since = time()
                        del chunk, event  # thousands may wait for the next
                    refused = self._end_of_stream()
                except APIError as error:
                    refused = _told(error)
            if self._left:
                return
            await self._pause()
            self._now(writing=True)
            await write(_DONE if refused is None else refused.to_event())
            self._said_all = True
        except asyncio.CancelledError:
            if not self._given_up or task is None or task.uncancel() > cancelling:
                raise
            logger.warning("a reader took nothing for %g s; its stream was left", self._send_timeout)
            self._left = True
        except OSError:  # it left while it was written to
            self._left = True
        finally:
            self.close()

    def _end_of_stream(self) -> Refusal | None:
        """Return what to say in place of `[DONE]`."""
        if self._stream.completeness is not None:
            return None  # whole, though the service may shut down
        if self._refusal is None and not self._left:
            # Read by somebody else, or left: what came before the end, nobody knows.
            logger.warning("a stream was left by something else while it was relayed")
            return refusal(ChatKoreError())
        return self._refusal

    # The timer.

    def _set_timer(self, seconds: float) -> None:
        if self._period != math.inf:
            self._timer = self._loop.call_later(min(seconds, self._period), self._look)

    def _look(self) -> None:
        """See whether the model has been silent for too long, or the reader."""
        limit = self._send_timeout if self._writing else self._heartbeat
        left = math.inf if limit is None else self._since + limit - self._loop.time()
        if left <= 0 and self._writing:
            assert self._task is not None
            self._given_up = True
            self._task.cancel()
            return
        if left <= 0:
            self._comment = self._loop.create_task(self._beat())
            left = self._period
        self._set_timer(left)

    async def _beat(self) -> None:
        assert self._write is not None
        self._now(writing=True)
        try:
            await self._write(_COMMENT)
        except OSError:
            self.reader_left()
        self._now(writing=False)

    def _now(self, *, writing: bool) -> None:
        self._writing = writing
        self._since = self._loop.time()

    async def _pause(self) -> None:
        """Let a comment that is being written come first."""
        if self._comment is not None:
            comment, self._comment = self._comment, None
            await comment


class Relays:
    """The streams that a service relays at the moment, and what becomes of them when it shuts down.

    Args:
        grace: seconds that they may go on then; `None` lets them go on as long as the server does.
    """

    def __init__(self, grace: float | None) -> None:
        self._grace = grace
        self._running: set[Relay] = set()
        self._stopping = False

    def __repr__(self) -> str:
        return f"<Relays {len(self._running)} running{', stopping' if self._stopping else ''}>"

    def begin(self, relay: Relay) -> None:
        """Know a relay from now on, until `forget`."""
        self._running.add(relay)
        if self._stopping:
            relay.end_within(self._grace)

    def forget(self, relay: Relay) -> None:
        """Know it no more."""
        self._running.discard(relay)

    def stop(self) -> None:
        """Shut down: streams end within the grace."""
        self._stopping = True
        for relay in self._running:
            relay.end_within(self._grace)

    def end(self) -> None:
        """End what still runs, at once."""
        for relay in list(self._running):
            relay.end()


def _seen(opening: asyncio.Task[None]) -> None:
    """Nobody may be left to ask how it went, which asyncio would complain of."""
    if not opening.cancelled():
        opening.exception()


def _told(error: APIError) -> Refusal:
    """Tell the operator what happened, and return what the reader is told."""
    told = refusal(error)
    logger.log(
        logging.WARNING if told.status >= 500 else logging.INFO,
        "a relayed stream failed, its reader is told %d: %s: %s",
        told.status,
        type(error).__name__,
        error,
    )
    return told
