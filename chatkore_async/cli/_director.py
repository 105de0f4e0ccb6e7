"""The script of `chatkore serve` at work: which rule takes a request, and what is answered then. No I/O."""

import fnmatch
import random
import re
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET

from chatkore_async.cli._faults import ANSWER, Rule, Script
from chatkore_async.testing import (
    Pause,
    Ping,
    Raw,
    Reply,
    Step,
    answer,
    completion,
    cut_after,
    error,
    html,
    json_reply,
    raw,
    reset_after,
    stall_after,
    stream,
    tool_call,
)

_Script = TypeVar("_Script", Reply, Raw)


class _Part(msgspec.Struct):
    text: str | None = None


class _Message(msgspec.Struct):
    role: str = ""
    content: str | list[_Part] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Asked(msgspec.Struct):
    """What rules look at in a request, and what their answers depend on."""

    model: str = ""
    messages: list[_Message] = []
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream was asked to end with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def text(self) -> str:
        """The text of the user's last message."""
        content = next((each.content for each in reversed(self.messages) if each.role == "user"), None)
        if isinstance(content, list):
            return " ".join(part.text for part in content if part.text)
        return content or ""


class Director:
    """Apply the rules of a script to requests as they come.

    Each rule counts the requests that come to it: which no rule before it took, and which fit its `model`, `stream`
    and `contains`. A request's number at a rule and the seed settle what `share` does with it.
    """

    def __init__(self, script: Script) -> None:
        self.rules = script.rules
        self._models = [
            None if rule.model is UNSET else re.compile(fnmatch.translate(rule.model)) for rule in script.rules
        ]
        self._words = [None if rule.contains is UNSET else rule.contains.casefold() for rule in script.rules]
        self._chances = [random.Random(f"{script.seed}/{index}") for index in range(len(script.rules))]  # noqa: S311 - no secret
        self._seen = [0] * len(script.rules)

    def pick(self, asked: Asked) -> int | None:
        """Return the number of the rule that takes the request, counted from 0, or `None`."""
        for index, rule in enumerate(self.rules):
            if self._fits(index, asked) and self._takes(index, rule):
                return index
        return None

    def _fits(self, index: int, asked: Asked) -> bool:
        model, words, stream = self._models[index], self._words[index], self.rules[index].stream
        return (
            (model is None or model.match(asked.model) is not None)
            and (stream is UNSET or stream is bool(asked.stream))
            and (words is None or words in asked.text.casefold())
        )

    def _takes(self, index: int, rule: Rule) -> bool:
        self._seen[index] = number = self._seen[index] + 1
        # Drawn for each, taken or not, so that a request's number settles it.
        chance = self._chances[index].random() if rule.share is not UNSET else 0.0
        return (
            (rule.first is UNSET or number <= rule.first)
            and (rule.every is UNSET or number % rule.every == 0)
            and (rule.share is UNSET or chance < rule.share)
        )


class Pace(msgspec.Struct, frozen=True):
    """How quick answers are where no rule says otherwise.

    Attributes:
        latency: seconds before an answer.
        interval: seconds between two deltas of a stream.
    """

    latency: float = 0.0
    interval: float = 0.0


def compose(rule: Rule | None, asked: Asked, body: bytes, pace: Pace) -> Reply | Raw:
    """Return the answer to a request.

    Args:
        rule: the one that took it.
        asked: the request.
        body: its bytes.
        pace: how quick answers are otherwise.
    """
    rule = rule or _NO_RULE
    latency = pace.latency if rule.latency is UNSET else rule.latency
    interval = pace.interval if rule.interval is UNSET else rule.interval
    if rule.raw is not UNSET:
        wait = [Pause(latency)] if latency else []
        return _ended(rule, raw(*wait, rule.raw.encode()))
    if rule.status is not UNSET:
        reply = _error(rule, rule.status)
    elif rule.given(ANSWER):
        reply = _told(rule, asked, body, interval)
    else:
        reply = answer(body, interval=interval)
    if _is_stream(reply):
        reply = msgspec.structs.replace(reply, steps=(*_wait(rule), *reply.steps))
    headers = with_defaults(rule.headers or {}, reply.headers)
    return _ended(rule, msgspec.structs.replace(reply, headers=headers, latency=latency))


def with_defaults(
    headers: dict[str, str] | tuple[tuple[str, str], ...], defaults: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    """Return headers together with those of the defaults that they do not name."""
    given = tuple(headers.items()) if isinstance(headers, dict) else headers
    names = {name.lower() for name, _ in given}
    return (*(pair for pair in defaults if pair[0].lower() not in names), *given)


_NO_RULE = Rule()


def _error(rule: Rule, status: int) -> Reply:
    if rule.html is not UNSET:
        return html(status, rule.html)
    if isinstance(rule.body, str):
        return error(status, body=rule.body.encode())
    if rule.body is not UNSET:
        return json_reply(rule.body, status)
    said: dict[str, Any] = {
        name: value for name in ("message", "code", "type") if (value := getattr(rule, name)) is not UNSET
    }
    return error(status, **said)


def _told(rule: Rule, asked: Asked, body: bytes, interval: float) -> Reply:
    """Return an answer of the rule's making; what it leaves open is taken from the server's own."""
    own = answer({**msgspec.json.decode(body), "stream": False})
    if own.status != 200:
        return own
    document = msgspec.json.decode(own.body)
    choice = document["choices"][0]
    text: str | None = None if rule.text is UNSET else rule.text
    pieces: list[str] | None = None if rule.pieces is UNSET else rule.pieces
    calls = [tool_call(each.name, each.arguments, id=f"call_{n}") for n, each in enumerate(rule.tool_calls or [], 1)]
    reason: str | None = "stop"
    if text is None and pieces is None and rule.tool_calls is UNSET:
        text, calls, reason = (
            choice["message"]["content"],
            choice["message"].get("tool_calls", []),
            choice["finish_reason"],
        )
    if rule.finish_reason is not UNSET:
        reason = rule.finish_reason
    reasoning = rule.reasoning or ""
    request_id = [pair for pair in own.headers if pair[0] == "x-request-id"]
    if asked.stream:
        return stream(
            (text or "") if pieces is None else pieces,
            interval=interval,
            finish_reason=reason,
            usage=asked.include_usage if rule.usage is UNSET else rule.usage,
            done=rule.done is not False,
            tool_calls=calls,
            reasoning=reasoning,
            model=asked.model,
            id=document["id"],
            headers=request_id,
        )
    return completion(
        text if pieces is None else "".join(pieces),
        finish_reason=reason,
        usage=True if rule.usage is UNSET else rule.usage,
        tool_calls=calls or None,
        message={"reasoning_content": reasoning} if reasoning else None,
        model=asked.model,
        id=document["id"],
        headers=request_id,
    )


def _wait(rule: Rule) -> list[Step]:
    """Return what comes before the first chunk of a stream: comments, spread over the delay."""
    pings = rule.pings or 0
    pause: list[Step] = [Pause(rule.first_delay / (pings + 1))] if rule.first_delay else []
    return [*pause, *(step for _ in range(pings) for step in (Ping(), *pause))]


def _ended(rule: Rule, reply: _Script) -> _Script:
    """Return the answer with the fault that ends it early, if there is one."""
    if rule.cut_after is not UNSET:
        return cut_after(reply, rule.cut_after)
    if rule.reset_after is not UNSET:
        return reset_after(reply, rule.reset_after)
    if rule.stall_after is not UNSET:
        return stall_after(reply, rule.stall_after)
    return reply


def _is_stream(reply: Reply) -> bool:
    return (reply.header("content-type") or "").startswith("text/event-stream")
