"""One call, from its start to its end: attempts, places, deadlines, and what is noted down on the way.

An attempt that succeeds at once passes through here without tenacity, without a timer of its own and without a
record of anything but a few numbers; the structs of `CallMeta` are made from these when they are asked for.
"""

import asyncio
import functools
import inspect
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias, TypeVar

from . import _hooks
from ._config import Secret, checked_key, conceal, fingerprint, merge_headers
from ._deadlines import NEVER, Deadline
from ._headers import plain_headers
from ._hooks import Outcome, logger
from ._limiter import Demand, Limiter, Report
from ._meta import Attempt
from ._notes import Head, Notes
from ._options import Outgoing
from ._responses import Usage
from ._retry import Retries, retry
from ._route import Route
from ._slots import Slots
from ._transport import Exchange, Pool
from ._words import MAX_BODY, masked
from .errors import APIError, APIStatusError, APITimeoutError, ConfigurationError, Phase, StreamStalledError

T = TypeVar("T")
E = TypeVar("E", bound=APIError)

Read: TypeAlias = Callable[[Head, bytes], T]
"""Reads a whole answer: what it returns is the call's result, what it raises its failure."""

Receive: TypeAlias = Callable[["Call", Exchange], Awaitable[None]]
"""Opens a stream: waits for as much of the answer as makes it one, or raises why it is none."""

_NO_PERMIT = object()  # a limiter's own permit may be anything, `None` too

_WAITING_FOR: dict[Phase, str] = {
    "queue": "the rate limiter's leave",
    "pool": "a free connection",
    "connect": "the connection",
    "answer": "the answer",
    "first_token": "the first token",
    "idle": "the next event of the stream",
    "total": "the end of the stream",
}


class Call(Deadline):
    """One call, which begins when it is made, by the task that asks.

    `ask` makes its attempts for a whole answer, or `open` for a stream, and `end` closes its books.

    Args:
        route: the way of the client's calls on the running loop, with this call's own options.
        outgoing: the encoded request.

    Attributes:
        waiting_since: when the reader of a stream began to wait for its next event; `NEVER` while it does not.
        id: what hooks know it by; empty where there are none.
    """

    # Has no slots: what most calls never write down has its default here, and costs them nothing.
    id = ""
    exchange: Exchange | None = None
    _permit: object = _NO_PERMIT
    _phase: Phase = "answer"
    _expired: Phase | None = None
    _cancelled_it = False

    def __init__(self, route: Route, outgoing: Outgoing) -> None:
        now = route.now()
        self.route = route
        self.outgoing = outgoing
        self.notes = Notes(secret=route.secret, started=now, began=now)
        task = self._task = asyncio.current_task(route.loop)  # to find the loop is a system call on 3.11
        self._cancelling = 0 if task is None else task.cancelling()
        if outgoing.stream:
            self._first_token_at = self.waiting_since = NEVER
            self.when = self._total_at = now + route.total_of_streams
        else:
            self.when = self._total_at = now + route.total
        route.deadlines.watch(self)
        if route.hooks:
            self._announce()

    def __repr__(self) -> str:
        return f"<Call {self.outgoing.method} {self.outgoing.url} {self._phase}>"

    @property
    def pool(self) -> Pool:
        """The running loop's."""
        return self.route.pool

    async def ask(
        self, read: Read[T], is_whole: Callable[[bytes], bool] | None = None, waited: float | None = None
    ) -> T:
        """Make attempts until one succeeds or none is left, and return what `read` made of the whole answer.

        When this returns, the books are still open. Whoever called calls `end`.

        The first attempt has no coroutine of its own, since thousands may wait here. Those after it are made by this
        one again, told how long they `waited`, and only fail.

        Args:
            read: makes a result of an answer.
            is_whole: tells of an answer that broke off whether it is one nevertheless, which was paid for.
            waited: for this attempt, in seconds; `None` for the first one.

        Raises:
            APIError: the last attempt's, with the call's metadata.
        """
        route, outgoing, notes = self.route, self.outgoing, self.notes
        pool = route.pool
        if waited is not None:
            self._begin_again(waited)
        headers, host_place = outgoing.headers, None
        try:
            if route.is_plain and pool.slots.take():
                notes.sent = notes.began
            else:
                headers, host_place = await self._admission()
            try:
                # The response has no name here: its headers may echo the key, and tracebacks show locals.
                answer = pool.answered(await route.request(outgoing, headers), host_place, notes, whole=True)
            except BaseException as caught:
                self._unanswered(caught, host_place)
                raise
            notes.first_byte = route.now()
            return read(notes, answer if isinstance(answer, bytes) else await self._rest(answer, is_whole))
        except BaseException as error:
            answer = b""  # it may echo the key as well
            if waited is not None:
                self._fail_attempt(error)
                raise
            return await self._recover(error, functools.partial(self.ask, read, is_whole))

    async def open(self, receive: Receive, waited: float | None = None) -> None:
        """Make attempts until `receive` opened a stream, or none is left.

        The call is not over then: the stream goes on under its deadline. Who leaves it, or comes to its end, calls
        `end`.

        Raises:
            APIError: the last attempt's, with the call's metadata.
        """
        pool = self.pool
        if waited is not None:
            self._begin_again(waited)
        try:
            headers, host_place = await self._admission()
            self._watch_stream()
            try:
                exchange = pool.answered(await self.route.request(self.outgoing, headers), host_place, self.notes)
            except BaseException as caught:
                self._unanswered(caught, host_place)
                raise
            self.notes.first_byte = self.route.now()
            self.exchange = exchange
            self._phase = "first_token"
            await receive(self, exchange)
        except BaseException as error:
            if waited is not None:
                self._fail_attempt(error)
                raise
            await self._recover(error, functools.partial(self.open, receive))

    async def _admission(self) -> tuple[Mapping[str, str] | None, Slots | None]:
        """Do all that an attempt needs before it is sent: its headers, the limiter's leave, a place.

        Returns:
            The headers beyond the session's, and the place of the host, where hosts are limited.
        """
        headers = await self._headers()
        limiter = self.route.settings.limiter
        if limiter is not None:
            await self._ask_leave(limiter)
        host_place = await self._take_place()
        self.notes.sent = self.route.now()
        return headers, host_place

    def _unanswered(self, caught: BaseException, host_place: Slots | None) -> None:
        """Give back the places of a request that was not answered, and raise our error for what it raised."""
        pool = self.pool
        pool.slots.release()
        if host_place is not None:
            host_place.release()
        try:
            pool.raise_ours(caught, self.outgoing.url, self.route.settings.timeout.connect)
        finally:
            del caught  # or its traceback, which has this frame, would hold itself

    async def _rest(self, exchange: Exchange, is_whole: Callable[[bytes], bool] | None) -> bytes:
        """Read an answer that is not there yet, or is long."""
        self.exchange = exchange
        if self.notes.is_success:
            return await exchange.read(self.pool.longest_body, is_whole=is_whole)
        return await exchange.read(MAX_BODY, cut=True)

    def _begin_again(self, waited: float) -> None:
        self.notes.begin_attempt(self.route.now(), waited)
        self._expired = None
        self._phase = "answer"

    async def _recover(self, error: BaseException, attempt: Callable[[float], Awaitable[T]]) -> T:
        """The first attempt failed: make others, or close the books and raise."""
        try:
            try:
                self._fail_attempt(error)
                raise error
            except APIError as failure:
                return await self._retry(failure, attempt)
        except APIError as failure:
            self._ended_by(failure)
            raise
        except asyncio.CancelledError as cancelled:
            # The deadline passed between two attempts.
            if self._was_ours():
                raise self._ended_by(self.timeout_error()) from cancelled
            self.end("cancelled")
            raise
        except BaseException as other:
            # The caller's own: an interrupt, or what a key callable raised.
            self.end("error" if isinstance(other, Exception) else "cancelled", other)
            raise
        finally:
            del error  # or its traceback, which has this frame, would hold itself

    async def _retry(self, error: APIError, attempt: Callable[[float], Awaitable[T]]) -> T:
        retries = Retries(self.route.settings.policy, self.route.bucket)

        def again(failure: APIError) -> float | None:
            if not retries.again(failure, self._total_at - self.route.now()):
                return None
            self._note_retry(failure, retries)
            return retries.delay

        try:
            return await retry(error, lambda: attempt(retries.delay), again=again, sleep=asyncio.sleep)
        finally:
            del error  # or its traceback, which has this frame, would hold itself

    def _fail_attempt(self, error: BaseException) -> None:
        """Write down that an attempt failed, and raise what stands in the place of `error` when a deadline passed."""
        if isinstance(error, APIError):
            if self._expired is not None:
                # The read failed because the deadline closed its connection.
                self._was_ours()
                raise self._noted(self.timeout_error()) from error
            self._noted(error)
            if error.message != (message := masked(error.message, self.notes.secret)):
                # Not even HTTP, and yet an echo of the key: what aiohttp raised shows it too, and so do its frames.
                error.message, error.args = message, (message,)
                error.__cause__ = error.__context__ = error.__traceback__ = None
        elif isinstance(error, asyncio.CancelledError) and self._was_ours():
            raise self._noted(self.timeout_error()) from error

    async def _headers(self) -> Mapping[str, str] | None:
        """Return the headers of this attempt beyond the session's, and note down the key among them."""
        settings, extra = self.route.settings, self.outgoing.headers
        endpoint, headers = settings.endpoint, self.route.headers
        if not isinstance(endpoint.key, Secret):
            secret = self.notes.secret = await _ask_for_key(endpoint.key)
            if not any(name.lower() == "authorization" for name in endpoint.headers_of_caller):
                headers = {**(headers or {}), "Authorization": Secret(f"Bearer {secret}")}
        if extra:
            headers = {**headers, **extra} if headers else extra
        if settings.hooks:
            started = _hooks.AttemptStart(call_id=self.id, number=len(self.notes.attempts) + 1)
            if added := _hooks.notify(settings.hooks, "on_attempt", started):
                try:
                    headers = merge_headers(headers or {}, added)
                except ConfigurationError as error:
                    logger.warning("a hook's headers are not sent: %s", error)
        return headers

    async def _ask_leave(self, limiter: Limiter) -> None:
        self._phase = "queue"
        settings, outgoing = self.route.settings, self.outgoing
        self._permit = await limiter.acquire(
            Demand(
                endpoint=settings.endpoint.base_url,
                model=outgoing.model,
                size=len(outgoing.body or b""),
                attempt=len(self.notes.attempts) + 1,
                key=fingerprint(self.notes.secret),
                body=outgoing.body or b"",
            )
        )
        self._phase = "answer"
        if self._total_at == NEVER and settings.counts_from_admission(stream=outgoing.stream):
            total = settings.timeout.total_for(stream=False)
            self._total_at = self.route.now() + (NEVER if total is None else total)
            self._look_at(self._total_at)

    async def _take_place(self) -> Slots | None:
        """Wait for a place, the host's first, and return the host's, where hosts are limited."""
        pool = self.pool
        host_place = pool.host_slots(self.outgoing.url)
        if host_place is not None and not host_place.take():
            self._phase = "pool"
            await host_place.wait()
        if not pool.slots.take():
            self._phase = "pool"
            try:
                await pool.slots.wait()
            except BaseException:
                if host_place is not None:
                    host_place.release()
                raise
        self._phase = "answer"
        return host_place

    # Deadlines. The call is one of the loop's; what it stands for is decided when it comes up.

    def _watch_stream(self) -> None:
        timeout, now = self.route.settings.timeout, self.route.now()
        self._first_token_at = NEVER if timeout.first_token is None else now + timeout.first_token
        self.waiting_since = now
        self._look_at(self._next_deadline(now))

    def first_delta(self, now: float) -> None:
        """The first delta of a stream came, so nothing is asked again, and who asked may be a task that ends."""
        self._task = None
        self.outgoing = self.outgoing.once_sent()
        self._phase = "total"
        self._first_token_at = NEVER
        sent = self.notes.sent
        self.notes.first_token = now
        if self.route.hooks and sent is not None:
            _hooks.notify(self.route.hooks, "on_first_token", _hooks.FirstToken(call_id=self.id, elapsed=now - sent))

    def _next_deadline(self, now: float) -> float:
        """The earliest moment at which one of the deadlines can pass.

        A stream that is not waited for now may be so in a moment: then it is idle from then on.
        """
        if not self.outgoing.stream:
            return self._total_at
        idle = self.route.settings.timeout.idle
        idle_at = NEVER if idle is None else min(now, self.waiting_since) + idle
        return min(self._total_at, self._first_token_at, idle_at)

    def _look_at(self, when: float) -> None:
        self.when = when
        if self.notes.ended is None:  # it may have been left meanwhile
            self.route.deadlines.watch(self)

    def expire(self) -> float | None:
        """A deadline may have passed. Runs in the loop's timer; answers when to look again."""
        now = self.route.now()
        coming = self._next_deadline(now)
        if coming > now:
            return coming
        if coming == self._total_at:
            self._expired = "total"
        else:
            self._expired = "first_token" if coming == self._first_token_at else "idle"
            # The next attempt is watched anew, and the total goes on meanwhile.
            self._first_token_at = self.waiting_since = NEVER
        if self.exchange is not None:
            self.exchange.abort()
        else:
            assert self._task is not None
            if self._phase == "answer" and self.pool.is_connecting(self._task):
                self._phase = "connect"
            self._cancelled_it = True
            self._task.cancel()
        return None if self._expired == "total" else self._total_at

    @property
    def expired(self) -> bool:
        """Whether a deadline of this call passed."""
        return self._expired is not None

    def _was_ours(self) -> bool:
        """Take back our deadline's cancellation, and tell whether it was the only one (as `asyncio.timeout` does)."""
        if not self._cancelled_it or self._task is None:
            return False
        self._cancelled_it = False
        return self._task.uncancel() <= self._cancelling

    def timeout_error(self) -> APITimeoutError:
        """Return the error for the deadline that passed."""
        timeout, phase = self.route.settings.timeout, self._phase
        if self._expired == "idle" and self.exchange is not None:
            return StreamStalledError(
                f"nothing but silence or pings for {timeout.idle:g} s", phase="idle", retryable="unconfirmed"
            )
        if self._expired == "first_token":
            seconds, phase = timeout.first_token, "first_token"
        else:
            seconds = timeout.idle if self._expired == "idle" else timeout.total_for(stream=self.outgoing.stream)
        return APITimeoutError(
            f"timed out after {seconds:g} s, waiting for {_WAITING_FOR[phase]}",
            phase=phase,
            retryable="yes" if phase == "connect" else "unconfirmed",
        )

    # Books.

    def _announce(self) -> None:
        self.id = os.urandom(8).hex()
        start = _hooks.CallStart(
            call_id=self.id, model=self.outgoing.model, stream=self.outgoing.stream, url=self.outgoing.url
        )
        _hooks.notify(self.route.hooks, "on_call_start", start)

    # An error that is made and raised in one frame must not be a local of it: its traceback has the frame, and both
    # would wait for the garbage collector. So what notes an error down returns it.

    def _ended_by(self, error: E) -> E:
        """Close the books over an error, and give it the call's metadata."""
        error._meta = self.notes
        self.end("error", error)
        return error

    def _noted(self, error: E) -> E:
        """Write down that an attempt failed."""
        notes = self.notes
        if self.exchange is not None:
            self.exchange.abort()
            self.exchange = None
        self._first_token_at = self.waiting_since = NEVER  # no server is waited for during a back-off
        attempt = notes.end_attempt(self.route.now(), type(error).__name__, error._reported_id)
        notes.attempts += (attempt,)
        notes.failed = True
        if logger.isEnabledFor(logging.DEBUG):
            self._log(attempt, type(error).__name__)
        self._release_permit(None, error)
        return error

    def fail(self, error: APIError) -> None:
        """Write down that a stream failed after its first delta, and give the error the call's metadata."""
        self._noted(error)
        error._meta = self.notes

    def _note_retry(self, error: APIError, retries: Retries) -> None:
        logger.info(
            "attempt %d failed (%s), the next follows in %.2f s", retries.count, error._headline(), retries.delay
        )
        if self.route.hooks:
            error._meta = self.notes.meta()
            event = _hooks.Retry(call_id=self.id, number=retries.count, error=error, delay=retries.delay)
            _hooks.notify(self.route.hooks, "on_retry", event)

    def _release_permit(self, usage: Usage | None, error: APIError | None) -> None:
        permit, self._permit = self._permit, _NO_PERMIT
        if permit is not _NO_PERMIT and self.route.settings.limiter is not None:
            notes = self.notes
            self.route.settings.limiter.release(
                permit,
                Report(
                    # An error inside a 200 has the status that its code stands for.
                    status=error.status_code if isinstance(error, APIStatusError) else notes.status or None,
                    headers=plain_headers(notes.headers),
                    usage=usage,
                    retry_after=None if error is None else error.retry_after,
                    error=None if error is None else type(error).__name__,
                ),
            )

    def _log(self, attempt: Attempt | None, outcome: str) -> None:
        notes = self.notes
        attempt = attempt or notes.end_attempt(notes.ended or notes.began, None, None)
        logger.debug(
            "%s %s: attempt %d: %s, status %s, %.3f s",
            self.outgoing.method,
            self.outgoing.url,
            attempt.number,
            outcome,
            attempt.status,
            attempt.elapsed,
        )

    def end(self, outcome: Outcome, error: BaseException | None = None, usage: Usage | None = None) -> None:
        """Close the books: the call is over. Doing so twice is fine."""
        notes, route = self.notes, self.route
        if notes.ended is not None:
            return
        notes.ended = route.now()
        route.deadlines.cancel(self)
        if self.exchange is not None:
            self.exchange.abort()
            self.exchange = None
        if self._permit is not _NO_PERMIT:
            self._release_permit(usage, None)
        if route.bucket.spent and outcome == "ok":
            route.bucket.refund()
        if not notes.failed and logger.isEnabledFor(logging.DEBUG):
            self._log(None, outcome)
        if route.hooks:
            raised = error if isinstance(error, Exception) else None
            event = _hooks.CallEnd(call_id=self.id, outcome=outcome, error=raised, meta=notes.meta())
            _hooks.notify(route.hooks, "on_call_end", event)


async def _ask_for_key(source: Callable[[], str | Awaitable[str]]) -> Secret:
    given = source()
    key = conceal(await given if inspect.isawaitable(given) else given)
    del given
    if not isinstance(key, Secret):
        raise ConfigurationError(f"the api_key callable returned {type(key).__name__}, not a string")
    return checked_key(key)
