"""`ChatStream`: an answer that arrives piece by piece.

What happens to one delta is kept short: the segment it came in is cut by `_sse`, its bytes are decoded into a chunk,
the chunk is merged, or put aside for that, and handed out. No task, no timer, no copy. All that is rare (errors, pings,
the end, forms that strict decoding refuses) is behind the one `try` or the one `if` of that way.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Any, Final, Self

from . import _codec
from ._accumulate import OVERFLOWED, Accumulator, has_delta
from ._call import Call
from ._codec import MISFIT
from ._config import Limits
from ._deadlines import NEVER
from ._events import READING_FAILED, EventReader
from ._foreign import mapped, reason
from ._hooks import logger
from ._meta import CallMeta
from ._protocol import DONE, not_the_api, read_completion, read_error, read_event, separated
from ._responses import ChatCompletion, ChatCompletionChunk, Completeness
from ._sse import EventTooLargeError, sole_event
from ._transport import Exchange
from ._words import MAX_BODY
from .errors import APIError, ChatKoreError, InvalidResponseError, StreamError, StreamInterruptedError

MAX_HELD: Final = 10_000
"""Chunks without a delta that are held until the first delta comes. One a second, as a keep-alive, is three hours."""

_BUSY: Final = "this ChatStream is being read by another task"


class ChatStream(AsyncGenerator[ChatCompletionChunk, None]):
    """The chunks of one streamed completion.

    It opens on `async with`, or at the first step of `async for`:

        async with client.chat.completions.stream(model=..., messages=...) as stream:
            async for chunk in stream:
                print(chunk.text, end="")

    Leaving the block, `aclose()` or cancellation frees the connection at once; a bare `async for` that breaks frees it
    when the stream is collected. It is read by one task at a time, and only once.

    Raises:
        StreamInterruptedError: the stream was cut, or ended before every choice had its finish reason.
        StreamStalledError: nothing but silence or pings came for `Timeout.idle` seconds.
        InvalidResponseError: it ended without a delta, or held what is not the API's.
        APIError: what an awaited call raises. After the first delta every error has `.partial`.
    """

    __slots__ = (
        "__weakref__",
        "_busy",
        "_call",
        "_completeness",
        "_done",
        "_ended",
        "_failure",
        "_held",
        "_hide_usage",
        "_limits",
        "_make_call",
        "_merged",
        "_opener",
        "_reader",
        "_usage_came_last",
    )

    def __init__(self, make_call: Callable[[], Call], *, hide_usage: bool, limits: Limits) -> None:
        self._make_call: Callable[[], Call] | None = make_call  # until it is made, since it has the request
        self._hide_usage = hide_usage
        self._limits = limits
        self._call: Call | None = None
        self._reader: EventReader | None = None
        self._merged = Accumulator()
        self._held: list[ChatCompletionChunk] = []  # up to the first delta, the next one last
        self._usage_came_last = False
        self._done = False  # `[DONE]` came
        self._ended = False  # nothing more will be handed out
        self._busy = False
        self._opener: asyncio.Task[Any] | None = None
        self._failure: Exception | None = None
        self._completeness: Completeness | None = None

    def __repr__(self) -> str:
        if self._call is None:
            state = "not opened"
        elif self._ended:
            state = self._completeness or "left"
        else:
            state = "open"
        return f"<ChatStream {state}>"

    # What it tells.

    @property
    def completeness(self) -> Completeness | None:
        """How the stream ended; `None` while it runs, and when its reader left early.

        `"complete"`: every started choice had a finish reason. `"unconfirmed"`: the server said it was done, but a
        started choice has none, which is how relays truncate. `"truncated"`: it just ended (and an error was raised).
        """
        return self._completeness

    @property
    def snapshot(self) -> ChatCompletion:
        """The completion so far, merged from the chunks handed out."""
        completion = self._merged.completion()
        if self._call is not None:
            completion._meta = self._call.notes
        return completion

    @property
    def meta(self) -> CallMeta:
        """The call's metadata so far."""
        return CallMeta() if self._call is None else self._call.notes.meta()

    @property
    def text_stream(self) -> AsyncIterator[str]:
        """The text of the first choice as it comes, without the chunks around it."""
        return self._texts()

    async def _texts(self) -> AsyncIterator[str]:
        async for chunk in self:
            if text := chunk.text:
                yield text

    async def get_final_completion(self) -> ChatCompletion:
        """Read to the end and return the merged completion.

        Raises:
            APIError: what reading the rest raises; what it raised already, when the stream has failed.
            StreamError: the stream was left before its end.
        """
        async for _ in self:
            pass
        if self._failure is not None:
            raise self._failure
        if self._completeness is None:
            raise StreamError("the stream was left before its end", partial=self.snapshot, meta=self.meta)
        return self.snapshot

    # How it is used.

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave(error)

    async def open(self) -> None:
        """Send the request and wait for the first delta. Doing so twice is fine.

        Raises:
            APIError: no attempt got as far as a delta.
        """
        if self._busy:
            raise RuntimeError(_BUSY)
        if self._make_call is None or self._ended:
            return
        call = self._call = self._make_call()
        self._make_call = None
        task = self._opener = asyncio.current_task()
        cancelling = 0 if task is None else task.cancelling()
        self._busy = True
        try:
            await call.open(self._receive)
        except BaseException as error:
            # Another task left the stream, which cancelled this one: it finds a stream that has ended.
            if self._ended and task is not None and task.uncancel() <= cancelling:
                return
            self._ended = True
            self._failure = error if isinstance(error, Exception) else None
            raise
        finally:
            self._busy = False
            self._opener = None

    def __aiter__(self) -> AsyncIterator[ChatCompletionChunk]:
        # A native generator costs a delta less than a call of `__anext__`. It keeps nothing of its own, so that a loop
        # which was left can be taken up by another.
        return self._chunks()

    async def __anext__(self) -> ChatCompletionChunk:
        # Written out: the one of `collections.abc.AsyncGenerator` costs a coroutine more.
        if (self._call is None or self._busy) and not self._ended:
            await self.open()
        while True:
            chunk = self._next()
            if chunk is not None:
                return chunk
            if self._ended:
                raise StopAsyncIteration
            await self._fill()

    async def asend(self, value: None) -> ChatCompletionChunk:
        """Return the next chunk. Only `None` may be sent; there is nobody who would take anything else."""
        if value is not None:
            raise TypeError("a ChatStream takes only None")
        return await self.__anext__()

    async def athrow(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
    ) -> ChatCompletionChunk:
        """Leave the stream and raise what is thrown."""
        if isinstance(kind, BaseException):
            error = kind
        elif isinstance(value, BaseException):
            error = value
        else:
            error = kind() if value is None else kind(value)
        self._leave(error)
        raise error if traceback is None else error.with_traceback(traceback)

    async def aclose(self) -> None:
        """Leave the stream: free the connection at once. Awaits nothing; doing so twice is fine."""
        self._leave(None)

    def __del__(self) -> None:
        call = getattr(self, "_call", None)
        if call is None or self._ended:
            return
        loop = call.pool.loop
        try:
            here = loop.is_closed() or asyncio.get_running_loop() is loop
        except RuntimeError:
            here = False
        with contextlib.suppress(RuntimeError):  # the loop is closed, or is closed in this very moment
            if here:
                call.end("left")
            else:  # the collector runs in whichever thread it likes
                loop.call_soon_threadsafe(call.end, "left")

    # How it works.

    async def _chunks(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        if (self._call is None or self._busy) and not self._ended:
            await self.open()
        reader = self._reader
        if reader is None:
            return  # it was left before there was anything
        call, events, content, read, merged = reader.call, reader.events, reader.content, reader.read, self._merged
        pending, decode, now = merged.pending, _codec.decode_chunk_strictly, call.route.now
        while self._held:
            pending.append(self._held[-1])
            yield self._held.pop()
        while True:
            named = reader.has_names
            while events:
                data = events.pop()
                try:
                    chunk = decode(data)
                except MISFIT:
                    pass
                else:
                    if chunk.choices and not (named and type(data) is not bytes):
                        chunk._raw = data
                        pending.append(chunk)
                        yield chunk
                        continue
                rare_data, data = [data], b""
                if (rare := self._read_rarely(rare_data)) is not None:
                    pending.append(rare)
                    yield rare
            if self._ended:
                return
            if self._done or reader.ended or self._busy or not reader.is_even:
                await self._fill()
                continue
            if pending:
                self._merge()
            # Most streams come with one event a segment. From one such delta to the next there is only this.
            while not (pending or events or self._ended or self._busy):
                began = call.waiting_since = now()
                self._busy = True
                try:
                    data = await read()
                    if content.total_bytes > reader.max_size or not (event := sole_event(data)):
                        reader.began, reader.unskipped = began, 0  # unless there is an event in it, the wait goes on
                        reader.take(data)
                        break
                except READING_FAILED as cause:
                    reader.began = began
                    reader.fail(cause)
                    break
                except asyncio.CancelledError as cancelled:
                    self._leave(cancelled)
                    raise
                finally:
                    self._busy = False
                call.waiting_since = NEVER
                if (gap := now() - began) > reader.max_gap:
                    reader.note_gap(gap)
                try:
                    chunk = decode(event)
                except MISFIT:
                    events.append(event)
                    break
                if not chunk.choices:
                    events.append(event)
                    break
                chunk._raw = event
                if not merged.add(chunk):
                    pending.append(chunk)
                yield chunk

    def _next(self) -> ChatCompletionChunk | None:
        """Return the next chunk of what has arrived, or `None` when more has to arrive first."""
        if self._reader is None:
            return None
        while self._held or self._reader.events:
            chunk = self._held.pop() if self._held else self._read(self._reader.events.pop())
            if chunk is not None:
                self._merged.pending.append(chunk)
                return chunk
        return None

    def _read(self, data: bytes) -> ChatCompletionChunk | None:
        try:
            chunk = _codec.decode_chunk_strictly(data)
        except MISFIT:
            pass
        else:
            if chunk.choices and type(data) is bytes:
                chunk._raw = data
                return chunk
        rare_data, data = [data], b""
        return self._read_rarely(rare_data)

    def _read_rarely(self, rare_data: list[bytes]) -> ChatCompletionChunk | None:
        """Read an event that is no common chunk: return a chunk to hand out, or `None`; raise what it reports.

        The event is taken out of a list, so that no frame of a traceback still has it: an error may echo the key.
        """
        call, reader = self._opened()
        data = rare_data.pop()
        parts = separated(data)
        if len(parts) > 1:
            reader.events.extend(reversed(parts))
            return None
        parts.clear()
        try:
            if reader.whole:
                read_completion(call.notes, data)  # S12: raises what a whole answer can hide
                self._done = True
            chunk = read_event(call.notes, data, self._merged)
        except APIError as error:
            data = b""
            error.__traceback__ = None  # the frames of the reading have the event, too
            if call.notes.first_token is None:
                raise  # the attempt failed as a plain call does, and may be repeated like one
            raise self._failed(error) from error.__cause__
        if chunk == DONE:
            self._done = True
            reader.events.clear()
            return None
        if isinstance(chunk, ChatCompletionChunk):
            if chunk.usage is None or chunk.choices:
                return chunk
            # Usage before the first delta announces; only usage after it says that the server was done.
            self._usage_came_last = call.notes.first_token is not None
            if not self._hide_usage:
                return chunk
            # We asked for it, the caller did not, and `chunk.choices[0]` is to be safe.
            self._merged.pending.append(chunk)
        else:
            reader.unskipped -= 1
        return None

    def _opened(self) -> tuple[Call, EventReader]:
        assert self._call is not None
        assert self._reader is not None
        return self._call, self._reader

    async def _receive(self, call: Call, exchange: Exchange) -> None:
        """Read one attempt's answer up to its first delta."""
        if not call.notes.is_success:
            body = await exchange.read(MAX_BODY, cut=True)
            try:
                raise read_error(call.notes, body) or not_the_api(call.notes, body, None)
            finally:
                del body  # it may echo the key, and tracebacks show locals
        reader = self._reader = EventReader(call, exchange, self._limits)
        self._held.clear()
        self._merged = Accumulator()
        self._done = self._usage_came_last = False
        while not (self._held and has_delta(self._held[-1])):
            if reader.events:
                if chunk := self._read(reader.events.pop()):
                    self._held.append(chunk)
                    if len(self._held) > MAX_HELD:
                        raise InvalidResponseError(f"the stream has {MAX_HELD:,} chunks and no delta")
            elif self._done or reader.ended:
                raise self._no_delta(call, reader) from reader.cause
            else:
                await reader.fill()
        self._held.reverse()
        call.first_delta(call.route.now())

    async def _fill(self) -> None:
        """Wait for what comes next. After the last of it, end the stream."""
        if self._busy:
            raise RuntimeError(_BUSY)
        call, reader = self._opened()
        self._busy = True
        try:
            if self._done or reader.ended:
                await self._conclude(call, reader)
                return
            self._merge()
            await reader.fill()
        except asyncio.CancelledError as cancelled:
            self._leave(cancelled)
            raise
        finally:
            self._busy = False

    def _merge(self) -> None:
        self._merged.merge()
        if self._merged.overflowed:
            raise self._failed(InvalidResponseError(f"the stream {OVERFLOWED}"))

    async def _conclude(self, call: Call, reader: EventReader) -> None:
        """Everything that arrived was handed out: decide how the stream ended."""
        self._merge()
        finished = self._merged.finished
        if not finished and not self._done and not self._usage_came_last:
            raise self._failed(self._truncation(call, reader)) from reader.cause
        if not finished:
            logger.warning(
                "a stream of %s ended without a finish reason, though the server said it was done: it may be cut",
                call.outgoing.url,
            )
        self._completeness = "complete" if finished else "unconfirmed"
        self._ended = True
        try:
            assert call.exchange is not None
            await call.exchange.drain(call.outgoing.url)
        finally:
            call.end("ok", usage=self._merged.usage)

    def _truncation(self, call: Call, reader: EventReader) -> APIError:
        """The error for a stream that ended before it was finished."""
        if call.expired:
            return call.timeout_error()
        if reader.stray and (error := read_error(call.notes, reader.stray)):
            return error
        if isinstance(reader.cause, EventTooLargeError):
            return InvalidResponseError(str(reader.cause), hint=reader.cause.hint)
        if reader.cause is None:
            return StreamInterruptedError("the stream ended before it was finished")
        return StreamInterruptedError(f"the stream broke off: {reason(reader.cause)}")

    def _no_delta(self, call: Call, reader: EventReader) -> ChatKoreError:
        """The error for a stream that ended without a first delta."""
        if reader.stray and (error := read_error(call.notes, reader.stray)):
            return error
        if isinstance(reader.cause, EventTooLargeError):
            return InvalidResponseError(str(reader.cause), hint=reader.cause.hint)
        if reader.cause is not None:
            return mapped(reader.cause, sent=True)
        if reader.stray:
            try:
                read_completion(call.notes, reader.stray)
            except APIError as error:  # text that is no event stream: what it is to an awaited call, it is here
                return error
        return InvalidResponseError("the stream ended without a delta", retryable="unconfirmed")

    def _failed(self, error: APIError) -> APIError:
        """Close the books over an error after the first delta, and give it what was delivered."""
        call, _ = self._opened()
        error.partial = self.snapshot
        self._completeness = "complete" if self._merged.finished else "truncated"
        error._retryable = "never"
        call.fail(error)
        self._ended = True
        self._failure = error
        call.end("error", error)
        return error

    def _leave(self, error: BaseException | None) -> None:
        """Free the connection. Awaits nothing, since frameworks cancel again at every await of a clean-up."""
        if self._ended:
            return
        self._ended = True
        self._held.clear()
        if self._reader is not None:
            self._reader.events.clear()
        if self._call is not None:
            self._call.end("cancelled" if isinstance(error, asyncio.CancelledError) else "left")
        if self._opener is not None:
            self._opener.cancel()
