"""Test doubles for programs that use ChatKore: a relay on the loopback interface that does as it is told.

::

    async with ChatKoreServer() as server:
        server.script(error(503), cut_after(stream("Hello there"), 300), completion("Fine."))

A reply is a status, headers and steps; every fault is a step, so faults compose. Without a script the server answers
by itself, plausibly and always the same.
"""

from chatkore_async.testing._answers import answer
from chatkore_async.testing._mock import ChatKoreMock, MockedRequest, mock_chatkore
from chatkore_async.testing._records import Outcome, RecordedConnection, RecordedRequest
from chatkore_async.testing._replies import completion, error, events, html, json_reply, raw, sse, stream
from chatkore_async.testing._server import ChatKoreServer, Responder
from chatkore_async.testing._shapes import tool_call
from chatkore_async.testing._steps import (
    Cut,
    Framing,
    Hold,
    Pause,
    Ping,
    Raw,
    Reply,
    Reset,
    Stall,
    Step,
    Waitable,
)
from chatkore_async.testing._wire import compressed, cut_after, reset_after, stall_after

__all__ = [
    "ChatKoreMock",
    "ChatKoreServer",
    "Cut",
    "Framing",
    "Hold",
    "MockedRequest",
    "Outcome",
    "Pause",
    "Ping",
    "Raw",
    "RecordedConnection",
    "RecordedRequest",
    "Reply",
    "Reset",
    "Responder",
    "Stall",
    "Step",
    "Waitable",
    "answer",
    "completion",
    "compressed",
    "cut_after",
    "error",
    "events",
    "html",
    "json_reply",
    "mock_chatkore",
    "raw",
    "reset_after",
    "sse",
    "stall_after",
    "stream",
    "tool_call",
]
