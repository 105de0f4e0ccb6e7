"""What `chatkore serve` does with each request: it is answered, counted and shown."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator

import msgspec

from chatkore_async.cli._director import Asked, Director, Pace, compose, with_defaults
from chatkore_async.cli._limits import RequestLimit
from chatkore_async.testing import Raw, RecordedRequest, Reply, answer

_decoder = msgspec.json.Decoder(Asked)

_OUTCOMES = {"answered": "", "cut": "cut after ", "gone": "client gone after "}


class Note(msgspec.Struct, eq=False):
    """What is remembered of a request until it has ended.

    Attributes:
        asked: what was read in it.
        rule: the number of the rule that took it.
    """

    asked: Asked
    rule: int | None = None


class Service:
    """Answer requests by a script and a limit, and tell of each that has ended.

    Attributes:
        ended: requests by how they ended: the status that was sent, `cut` by the script, or their client `gone`.
        broken: ends with what `show` raised: a reader of our output that has left, a disk that is full.

    Args:
        pace: how quick answers are.
        director: the script at work.
        limit: of requests that are let in.
        show: is given a line for each request.
    """

    def __init__(
        self,
        pace: Pace,
        *,
        director: Director | None = None,
        limit: RequestLimit | None = None,
        show: Callable[[str], object],
    ) -> None:
        self.ended: Counter[str] = Counter()
        self.broken: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pace = pace
        self._director = director
        self._limit = limit
        self._show = show
        # By the request itself, which is the same object when it has ended, and is not kept beyond that.
        self._notes: dict[RecordedRequest, Note] = {}

    def respond(self, request: RecordedRequest) -> Reply | Raw | None:
        """Return the answer, or `None` for what is no chat completion."""
        if request.method != "POST" or not request.path.rstrip("/").endswith("/chat/completions"):
            return None
        try:
            asked = _decoder.decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return answer(request.body)  # which says what is wrong with it
        note = self._notes[request] = Note(asked)
        decision = self._limit.ask() if self._limit is not None else None
        if decision is not None and decision.retry_after:
            return decision.refusal(asked.model)
        rule = None
        if self._director is not None:
            note.rule = self._director.pick(asked)
            rule = self._director.rules[note.rule] if note.rule is not None else None
        reply = compose(rule, asked, request.body, self._pace)
        if decision is None or isinstance(reply, Raw):
            return reply
        return msgspec.structs.replace(reply, headers=with_defaults(reply.headers, decision.headers))

    def end(self, request: RecordedRequest) -> None:
        """Count a request that has ended, and show it."""
        note = self._notes.pop(request, None)
        outcome = request.outcome
        assert outcome is not None
        self.ended[str(request.status or "raw") if outcome == "answered" else outcome] += 1
        seconds = asyncio.get_running_loop().time() - request.received_at
        try:
            self._show(f"{time.strftime('%H:%M:%S')}  {described(request, note, seconds)}")
        except OSError as error:  # nobody reads our output any more, or the disk is full
            if not self.broken.done():
                self.broken.set_exception(error)


class Complaints(logging.Handler):
    """Show what a server logs, such as bytes that are no HTTP, as a line each, without the traceback.

    Args:
        show: is given the line.
    """

    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Show the line."""
        error = record.exc_info[1] if record.exc_info else None
        said = " ".join(str(error or record.getMessage()).split())
        with contextlib.suppress(OSError):  # the next request tells that nobody reads it
            self._show(f"{time.strftime('%H:%M:%S')}  error: {shown(said, 100)}")

    @contextlib.contextmanager
    def of(self, name: str) -> Generator[None, None, None]:
        """Take over all that a logger is told."""
        logger = logging.getLogger(name)
        propagates, logger.propagate = logger.propagate, False
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.propagate = propagates


def described(request: RecordedRequest, note: Note | None, seconds: float) -> str:
    """Return the line for a request that has ended: what was sent, what was asked, how it went.

    Args:
        request: the request.
        note: what was read in it, if it was a chat completion.
        seconds: how long it took.
    """
    parts = [str(request.status or ("---" if request.outcome == "gone" else "raw"))]
    parts.append(f"{shown(request.method)} {shown(request.path)}")
    if note is not None:
        parts.append(shown(note.asked.model) + (" stream" if note.asked.stream else ""))
    parts.append(f"{_OUTCOMES[request.outcome or 'gone']}{seconds * 1000:.0f} ms")
    if note is not None and note.rule is not None:
        parts.append(f"rules[{note.rule}]")
    return "  ".join(parts)


def shown(text: str, most: int = 60) -> str:
    """Return what a client sent so that it stays in its line, and a terminal shows it and does not obey it."""
    text = "".join(each if each.isprintable() else "\ufffd" for each in text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"
