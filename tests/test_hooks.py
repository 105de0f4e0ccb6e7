"""Hooks watch; they never break a call."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from chatkore_async import _hooks
from chatkore_async._hooks import AttemptStart, CallEnd, CallStart, FirstToken, Hook, Retry, notify
from chatkore_async._meta import CallMeta

EVENT = AttemptStart(call_id="c", number=1)
EVENTS = [
    ("on_call_start", CallStart(call_id="c", model="m", stream=False, url="https://host")),
    ("on_attempt", EVENT),
    ("on_retry", Retry(call_id="c", number=1, error=ValueError(), delay=0.5)),
    ("on_first_token", FirstToken(call_id="c", elapsed=0.1)),
    ("on_call_end", CallEnd(call_id="c", outcome="ok", error=None, meta=CallMeta())),
]


class Recorder:
    """A hook with one method, which does what it is told."""

    def __init__(self, given: Any = None, error: BaseException | None = None) -> None:
        self.seen: list[object] = []
        self.given = given
        self.error = error

    def on_attempt(self, event: AttemptStart) -> Any:
        self.seen.append(event)
        if self.error is not None:
            raise self.error
        return self.given


@pytest.mark.parametrize("method, event", EVENTS)
def test_every_method_is_optional(method: str, event: object) -> None:
    """A hook has the methods it needs; an explicit subclass inherits ones that do nothing."""

    class Inherited(Hook):
        pass

    hook = Recorder()
    assert notify([object(), hook, Inherited()], method, event) == {}
    assert hook.seen == ([event] if method == "on_attempt" else [])


@pytest.mark.parametrize("method, event", EVENTS)
def test_an_event_is_frozen_and_names_its_call(method: str, event: Any) -> None:
    """Several hooks are given the same record; `call_id` ties the records of a call together."""
    assert hasattr(Hook, method)
    assert event.call_id == "c"
    with pytest.raises(AttributeError):
        event.call_id = "other"
    assert isinstance(event, msgspec.Struct)


def test_headers_are_merged() -> None:
    """Trace context of all hooks is sent; the later hook wins."""
    hooks = [Recorder({"a": "1", "b": "1"}), Recorder(None), Recorder({"b": "2"}), Recorder({})]
    assert notify(hooks, "on_attempt", EVENT) == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    "broken", [Recorder(error=RuntimeError("boom")), Recorder(7), Recorder("text"), Recorder([("a", "b"), 5])]
)
def test_a_hook_that_fails_is_logged_and_breaks_nothing(broken: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """The call goes on, the other hooks are told, and the log names the method."""
    first, last = Recorder({"a": "1"}), Recorder({"b": "2"})
    with caplog.at_level(logging.ERROR, logger="chatkore_async"):
        assert notify([first, broken, last], "on_attempt", EVENT) == {"a": "1", "b": "2"}
    assert len(last.seen) == 1
    (record,) = caplog.records
    assert record.name == "chatkore_async"
    assert "on_attempt" in record.getMessage()
    assert record.exc_info


def test_a_hook_whose_methods_cannot_be_looked_up_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A property that raises is a hook that raises."""

    class Broken:
        @property
        def on_attempt(self) -> None:
            raise RuntimeError("boom")

    assert notify([Broken()], "on_attempt", EVENT) == {}
    assert "boom" in caplog.text


def test_only_an_attempt_takes_headers(caplog: pytest.LogCaptureFixture) -> None:
    """What other methods return, such as a counter's new value, is nobody's business."""

    class Counter:
        def on_call_start(self, _event: CallStart) -> int:
            return 7

        def on_call_end(self, _event: CallEnd) -> Mapping[str, str]:
            return {"a": "b"}

    assert notify([Counter()], "on_call_start", EVENTS[0][1]) == {}
    assert notify([Counter()], "on_call_end", EVENTS[-1][1]) == {}
    assert not caplog.records


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit()])
def test_what_ends_a_program_passes(error: BaseException) -> None:
    """A hook that raises an exit or a cancellation means it."""
    with pytest.raises(type(error)):
        notify([Recorder(error=error)], "on_attempt", EVENT)


def test_the_logger_has_the_packages_name() -> None:
    """So that one line of a logging configuration finds it."""
    assert _hooks.logger.name == "chatkore_async"
