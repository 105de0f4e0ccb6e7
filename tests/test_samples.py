"""What servers really send, replayed: each folder of `tests/samples/` in every form that means the same."""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sampling import KEY, SAMPLES, Sample, Way

from chatkore_async import APIError, AsyncChatKore, ChatCompletion, RetryPolicy, Timeout
from chatkore_async._codec import MISFIT, decode_chunk_strictly
from chatkore_async._sse import Decoder, Event
from chatkore_async.testing import ChatKoreServer

ROOT = Path(__file__).parent.parent
POLICY = RetryPolicy(max_retries=2, initial_delay=0, max_retry_after=0, budget=None)
QUESTION: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


async def ask(client: AsyncChatKore, way: Way) -> tuple[ChatCompletion, dict[str, Any]]:
    """Return the answer, and what only a stream tells."""
    if way == "call":
        completion = await client.chat.completions.create(**QUESTION)
        return completion, {"completeness": completion.completeness, "dicts": [completion.to_dict()]}
    async with client.chat.completions.stream(**QUESTION) as stream:
        chunks = [chunk async for chunk in stream]
        completion = await stream.get_final_completion()
    first = (choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == 0)
    assert "".join(first) == completion.text, "what was handed out is not what was merged"
    for chunk in chunks:
        assert_well_typed(chunk)
    return completion, {
        "completeness": stream.completeness,
        "chunks": len(chunks),
        "dicts": [chunk.to_dict() for chunk in chunks],
    }


def assert_well_typed(answer: msgspec.Struct) -> None:
    """Whatever was sent, what a field holds is what it is declared as."""
    assert msgspec.convert(msgspec.to_builtins(answer), type(answer)) == answer


def seen_of_completion(completion: ChatCompletion) -> dict[str, Any]:
    choice = completion.choices[0]
    return {
        "text": completion.text,
        "texts": [choice.message.content or "" for choice in completion.choices],
        "reasoning": choice.message.reasoning_content,
        "refusal": choice.message.refusal,
        "role": choice.message.role,
        "finish_reason": choice.finish_reason,
        "tool_calls": [(call.id, call.function.name, call.function.arguments) for call in completion.tool_calls],
        "usage": completion.usage,
        "id": completion.id,
        "model": completion.model,
        "created": completion.created,
        "request_id": completion.meta.request_id,
        "rate_limit": completion.meta.rate_limit,
    }


def seen_of_error(error: APIError) -> dict[str, Any]:
    names = ("status_code", "code", "type", "param", "hint", "request_id", "retry_after", "phase", "body")
    return {name: getattr(error, name, None) for name in names} | {
        "error": type(error).__name__,
        "message": str(error),
        "attempts": len(error.attempts),
        "partial": None if error.partial is None else error.partial.text,
        "rate_limit": error.meta.rate_limit,
    }


def at(whole: Any, path: str) -> Any:
    """Return what stands in JSON at a dotted path, and `None` where there is nothing."""
    for step in path.split("."):
        if isinstance(whole, list):
            whole = whole[int(step)] if int(step) < len(whole) else None
        else:
            whole = (whole or {}).get(step)
    return whole


def compare(expected: dict[str, Any], seen: dict[str, Any]) -> None:
    """Hold what was seen against each thing that is expected."""
    for name, value in expected.items():
        if value is None or name in ("mapping", "absent", "logged"):
            continue
        got = seen[name]
        if name in ("message", "hint", "body"):
            assert value in str(got), f"{name}: {value!r} is not in {got!r}"
        elif name in ("usage", "rate_limit"):
            assert got is not None, f"no {name}"
            assert {field: getattr(got, field) for field in value} == value
        elif name == "tool_calls":
            assert [(name, arguments) for _, name, arguments in got] == [(call.name, call.arguments) for call in value]
            for (given, _, _), call in zip(got, value, strict=True):
                assert call.id is None or call.id == given, f"tool call id: {given!r}"
        else:
            assert got == value, f"{name}: {got!r}, expected {value!r}"
    for name in expected["absent"]:
        assert not seen[name], f"{name}: {seen[name]!r}, expected none"
    for path, value in (expected["mapping"] or {}).items():
        assert value in [at(whole, path) for whole in seen["dicts"]], path


@pytest.mark.parametrize("sample, way", [(sample, way) for sample in SAMPLES for way in sample.case.asked], ids=str)
async def test_sample(server: ChatKoreServer, sample: Sample, way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """Each form of an answer means what its case says: whole or split, whatever ends its lines, with a BOM, gzipped."""
    try:
        await replay(server, sample, way, caplog, 1)
    except BaseException:
        # On a busy machine tens of milliseconds may pass before the answer is there.
        if not sample.case.timeout:
            raise
        await replay(server, sample, way, caplog, 20)


async def replay(
    server: ChatKoreServer, sample: Sample, way: Way, caplog: pytest.LogCaptureFixture, slowness: float
) -> None:
    """Ask for each form of a sample, and compare. `slowness` stretches all deadlines."""
    expected = sample.expected(way)
    timeout = Timeout(total=60.0, **{name: seconds * slowness for name, seconds in sample.case.timeout.items()})
    async with AsyncChatKore(api_key=KEY, base_url=server.base_url, retry=POLICY, timeout=timeout) as client:
        for form, reply in sample.replies(slowness):
            caplog.clear()
            server.always(reply)
            try:
                with caplog.at_level(logging.DEBUG, "chatkore_async"):
                    await check(client, way, expected)
                assert client.pool.in_use == 0, "a connection is still in use"
            except BaseException as problem:
                problem.add_note(f"{sample.name}: {sample.case.what} As a {way}, form: {form}.")
                raise
            assert KEY not in caplog.text
            assert expected["logged"] is None or expected["logged"] in caplog.text, caplog.text


async def outcome(client: AsyncChatKore, way: Way) -> tuple[ChatCompletion | None, dict[str, Any], APIError | None]:
    try:
        completion, more = await ask(client, way)
    except APIError as error:
        return None, {}, error
    return completion, more, None


async def check(client: AsyncChatKore, way: Way, expected: dict[str, Any]) -> None:
    """Ask once, and compare what comes of it."""
    completion, more, failure = await outcome(client, way)
    if failure is not None:
        if expected["error"] is None:
            raise failure
        compare(expected, seen_of_error(failure))
        shown = f"{failure!s}{failure!r}{failure.partial!r}{pickle.dumps(failure)!r}"
        assert KEY not in shown, "the key is shown"
        assert "\n" not in str(failure), "the message has more than one line"
        return
    assert completion is not None
    assert expected["error"] is None, f"expected {expected['error']}, got {completion!r}"
    assert_well_typed(completion)
    expected = {**expected, "completeness": expected["completeness"] or "complete"}
    compare(expected, seen_of_completion(completion) | more)


def told(events: list[bytes]) -> list[tuple[str, bytes]]:
    return [(event.name if isinstance(event, Event) else "", bytes(event)) for event in events]


def cuts(body: bytes) -> set[int]:
    """Return where to cut an event stream in two: all about the ends and the beginnings of lines, and here and there."""
    near = (at + off for at, byte in enumerate(body) if byte in b"\r\n" for off in range(-2, 9))
    return {at for at in (*near, *range(0, len(body), len(body) // 100 + 1)) if 0 <= at <= len(body)}


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.kind == "sse"], ids=str)
def test_any_split_gives_the_same_events(sample: Sample) -> None:
    """An event stream has the same events wherever it is cut in two, and with any of the three line ends."""
    bodies = [sample.body]
    if sample.is_sse:
        bodies += [sample.body.replace(b"\n", b"\r\n"), sample.body.replace(b"\n", b"\r")]
    whole: list[tuple[str, bytes]] | None = None
    for body in bodies:
        for at_byte in cuts(body):
            decoder = Decoder()
            events = [*decoder.feed(body[:at_byte]), *decoder.feed(body[at_byte:]), *decoder.finish()]
            whole = told(events) if whole is None else whole
            assert told(events) == whole, at_byte


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.case.strict is not None], ids=str)
def test_healthy_messages_are_decoded_strictly(sample: Sample) -> None:
    """No chunk of a stream as the API documents it takes the tolerant path, and an odd one does."""
    decoder = Decoder()
    events = [event for event in (*decoder.feed(sample.body), *decoder.finish()) if event.strip() != b"[DONE]"]
    assert events
    assert all(map(fits, events)) == sample.case.strict


def fits(event: bytes) -> bool:
    try:
        decode_chunk_strictly(event)
    except MISFIT:
        return False
    return True


def test_every_hazard_has_a_sample() -> None:
    """Each id of the page on hazards has a sample, and each sample an id of that page."""
    page = (ROOT / "docs" / "explanation" / "wire.md").read_text(encoding="utf-8")
    hazards = set(re.findall(r"^\| ([ESC]\d+) \|", page, re.MULTILINE))
    shown = {hazard for sample in SAMPLES for hazard in sample.case.ids}
    assert sorted(hazards - shown) == []
    assert sorted(shown - hazards) == []


def test_there_are_many_samples_and_no_two_are_one() -> None:
    """What was learnt of servers is not lost, and no case is there twice under two names."""
    seen: dict[object, str] = {}
    for sample in SAMPLES:
        case = sample.case
        sent = (sample.body, case.status, *sorted(case.headers.items()), case.end, case.pings, *case.timeout)
        assert sent not in seen, f"{sample} is {seen.get(sent)}"
        seen[sent] = sample.name
    assert len(seen) >= 120
