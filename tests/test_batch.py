"""Batches: what is asked, what is written, what is refused, and how a run goes on from where another ended."""

import asyncio
import errno
import gzip
import json
import os
import stat
import sys
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chatkore_async import AsyncChatKore, BatchError, ChatCompletion, ConfigurationError, MapResults
from chatkore_async._batch_files import Input
from chatkore_async._batch_lines import (
    answer_line,
    failure_line,
    read_result,
    read_task,
)
from chatkore_async._batch_plan import HANDFUL, Plan
from chatkore_async.batch import BatchSummary, _slices, run_batch
from chatkore_async.errors import (
    InvalidRequestError,
)
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    RecordedRequest,
    Reply,
    completion,
    error,
    html,
    json_reply,
    raw,
)
from chatkore_async.types import ChatCompletionMessage, Choice

PATIENCE = 30.0
"""Seconds after which something hangs."""


def request(number: object, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Hello {number}"}]
    return {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, **body},
    }


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def requests(count: int) -> bytes:
    return jsonl(*(request(number) for number in range(count)))


def results(path: Path) -> dict[str, Any]:
    """The lines of an output by name; each name once."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def number_of(asked: RecordedRequest) -> str:
    return asked.json["messages"][0]["content"].removeprefix("Hello ")


def echo(asked: RecordedRequest) -> Reply:
    return completion(number_of(asked))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
async def plain(server: ChatKoreServer) -> AsyncIterator[AsyncChatKore]:
    """A client that makes one attempt."""
    async with AsyncChatKore(api_key="sk-secret", base_url=server.base_url, max_retries=0) as client:
        yield client


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def files_in(place: Path) -> set[str]:
    return {each.name for each in place.iterdir()}


# A run.


async def test_each_request_gets_a_line(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """The output has one line for each request, in the form of OpenAI's Batch API."""
    server.respond_with(echo)
    (place / "in.jsonl").write_bytes(requests(100))
    summary = await run_batch(client, place / "in.jsonl", str(place / "out.jsonl"))
    assert msgspec.structs.replace(summary, elapsed=0.0) == BatchSummary(
        total=100, completed=100, failed=0, resumed=0, prompt_tokens=1000, completion_tokens=summary.completion_tokens
    )
    assert summary.ok
    assert summary.done == 100
    assert summary.elapsed > 0
    written = results(place / "out.jsonl")
    assert written.keys() == {f"r{number}" for number in range(100)}
    for number in range(100):
        line = written[f"r{number}"]
        assert list(line) == ["id", "custom_id", "response", "error"]
        assert line["id"].startswith("batch_req_")
        assert line["error"] is None
        assert list(line["response"]) == ["status_code", "request_id", "body"]
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["choices"][0]["message"]["content"] == str(number)
    assert len({line["id"] for line in written.values()}) == 100
    assert server.request_count == 100
    assert files_in(place) == {"in.jsonl", "out.jsonl"}


async def test_a_body_is_sent_as_it_is(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """Every field of a body reaches the server, a vendor's and one named like an option of ours included."""
    body = {"temperature": None, "top_k": 4, "timeout": 7, "max_tokens": 5, "extra_body": {"a": 1}, "seed": 2**60}
    run = jsonl(request(1, **body), request(2, stream=False))
    await run_batch(client, BytesIO(run), place / "out.jsonl")
    sent = {number_of(each): each.json for each in server.requests}
    assert sent["1"] == {"model": "m", "messages": [{"role": "user", "content": "Hello 1"}], **body}
    assert sent["2"].keys() == {"model", "messages"}


async def test_an_answer_is_written_whole(plain: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """What a server adds, integers too large for 64 bits and half an emoji come out as JSON on one line."""
    odd = b'{\n "choices": [{"message": {"content": "\\ud83d\\nx"}, "finish_reason": "stop"}], "big": %d\n}' % 2**70
    server.script(json_reply(msgspec.Raw(odd), headers={"x-request-id": "req-7"}))
    await run_batch(plain, BytesIO(requests(1)), place / "out.jsonl")
    [line] = (place / "out.jsonl").read_bytes().splitlines()
    response = json.loads(line)["response"]
    assert response["body"]["choices"][0]["message"]["content"] == "\ufffd\nx"
    assert response["body"]["big"] == 2**70
    assert response["request_id"] == "req-7"
    assert not read_result(line).failed


async def test_a_failure_has_a_line(plain: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """An error status is a response; what has none is an error; an error inside a 200 is both. No line has the key."""
    replies = {
        "0": error(429, "slow down", code="rate_limit_exceeded", headers={"x-request-id": "req-0"}),
        "1": raw(Cut()),
        "2": html(502, "Bad gateway"),
        "3": json_reply({"error": {"message": "no sk-secret here", "code": "odd"}}),
        "4": html(200, "Welcome"),
        "5": error(400, "your key sk-secret is wrong"),
    }
    server.respond_with(lambda asked: replies[number_of(asked)])
    seen: list[BatchSummary] = []
    summary = await run_batch(plain, BytesIO(requests(6)), place / "out.jsonl", on_progress=seen.append)
    assert (summary.total, summary.completed, summary.failed, summary.ok) == (6, 0, 6, False)
    assert [each.failed for each in seen] == list(range(7))
    lines = results(place / "out.jsonl")
    assert lines["r0"]["error"] is None
    assert lines["r0"]["response"] == {
        "status_code": 429,
        "request_id": "req-0",
        "body": {"error": {"message": "slow down", "type": None, "param": None, "code": "rate_limit_exceeded"}},
    } | {"body": lines["r0"]["response"]["body"]}
    assert lines["r0"]["response"]["body"]["error"]["code"] == "rate_limit_exceeded"
    assert lines["r1"]["response"] is None
    assert lines["r1"]["error"]["code"] == "connection_error"
    assert lines["r2"]["response"]["status_code"] == 502
    assert lines["r2"]["response"]["body"]["error"]["message"] == "Bad gateway"
    assert lines["r3"]["response"]["status_code"] == 200
    assert lines["r3"]["error"]["code"] == "odd"
    assert lines["r4"]["response"] is None
    assert lines["r4"]["error"]["code"] == "invalid_response"
    assert lines["r5"]["response"]["status_code"] == 400
    assert "sk-secret" not in (place / "out.jsonl").read_text()
    assert all(read_result(line).failed for line in (place / "out.jsonl").read_bytes().splitlines())


async def test_a_call_that_times_out_has_the_code_of_openai(server: ChatKoreServer, place: Path) -> None:
    """A deadline that passed is `request_timeout`, which readers of OpenAI's batches know."""
    server.always(completion("late", latency=PATIENCE))
    async with AsyncChatKore(api_key="k", base_url=server.base_url, timeout=0.05, max_retries=0) as client:
        await run_batch(client, BytesIO(requests(1)), place / "out.jsonl")
    assert results(place / "out.jsonl")["r0"]["error"]["code"] == "request_timeout"


async def test_progress_comes_before_the_first_request_and_after_each(
    client: AsyncChatKore, server: ChatKoreServer, place: Path
) -> None:
    """Whoever shows progress learns the total first, and tokens and seconds as they come."""
    server.respond_with(echo)
    seen: list[BatchSummary] = []
    await run_batch(client, BytesIO(requests(5)), place / "out.jsonl", concurrency=2, on_progress=seen.append)
    assert [(each.total, each.done) for each in seen] == [(5, number) for number in range(6)]
    assert [each.prompt_tokens for each in seen] == [10 * number for number in range(6)]
    assert all(after.elapsed >= before.elapsed for before, after in pairwise(seen))


async def test_lines_are_there_as_soon_as_they_are_finished(
    client: AsyncChatKore, server: ChatKoreServer, place: Path
) -> None:
    """A result is in the file while the next request is still on its way."""
    first, go_on = asyncio.Event(), asyncio.Event()

    async def respond(asked: RecordedRequest) -> Reply:
        if number_of(asked) != "0":
            first.set()
            await go_on.wait()
        return echo(asked)

    server.respond_with(respond)
    run = asyncio.create_task(run_batch(client, BytesIO(requests(2)), place / "out.jsonl", concurrency=2))
    async with asyncio.timeout(PATIENCE):
        await first.wait()
        while (place / "out.jsonl").read_bytes().count(b"\n") != 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
        go_on.set()
        assert (await run).completed == 2


@pytest.mark.parametrize(
    "form", ["path", "text", "file", "memory", "gzip", "two gzips", "dos", "bom", "no last line end"]
)
async def test_forms_of_the_input(client: AsyncChatKore, server: ChatKoreServer, place: Path, form: str) -> None:
    """A path or an open file, gzip or not, with a BOM, DOS line ends, blank lines, or no last line end."""
    server.respond_with(echo)
    data = requests(5)
    if form == "gzip":
        data = gzip.compress(data)
    elif form == "two gzips":
        data = gzip.compress(requests(3)) + gzip.compress(jsonl(request(3), request(4)))
    elif form == "dos":
        data = data.replace(b"\n", b"\r\n\r\n")
    elif form == "bom":
        data = b"\xef\xbb\xbf" + data
    elif form == "no last line end":
        data = data.rstrip(b"\n")
    path = place / "in.jsonl"
    path.write_bytes(data)
    if form == "memory":
        source: Any = BytesIO(data)
        source.seek(7)
        await run_batch(client, source, place / "out.jsonl")
        assert not source.closed
    elif form == "file":
        with path.open("rb") as opened:
            await run_batch(client, opened, place / "out.jsonl")
            assert not opened.closed
    else:
        await run_batch(client, str(path) if form == "text" else path, place / "out.jsonl")
    assert results(place / "out.jsonl").keys() == {"r0", "r1", "r2", "r3", "r4"}


async def test_an_empty_batch(client: AsyncChatKore, place: Path) -> None:
    """No request, no result, and an output that says so."""
    (place / "in.jsonl").write_bytes(b"\n\n")
    summary = await run_batch(client, place / "in.jsonl", place / "out.jsonl")
    assert (summary.total, summary.done, summary.ok) == (0, 0, True)
    assert (place / "out.jsonl").read_bytes() == b""


async def test_many_lines_at_once(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """Files of more lines than are read at one go, or larger than that, are read to their end, on resuming too."""
    asyncio.get_running_loop().set_debug(False)
    server.always(completion("x"))
    data = jsonl(*(request(number, user="u" * (5000 if number % 50 == 0 else 1)) for number in range(1500)))
    (place / "in.jsonl").write_bytes(data)
    assert (await run_batch(client, place / "in.jsonl", place / "out.jsonl", concurrency=200)).completed == 1500
    lines = (place / "out.jsonl").read_bytes().splitlines(keepends=True)
    (place / "out.jsonl").write_bytes(b"".join(lines[:5] + lines[1200:]))
    summary = await run_batch(client, place / "in.jsonl", place / "out.jsonl", concurrency=200)
    assert (summary.resumed, summary.completed) == (305, 1500)
    assert len(results(place / "out.jsonl")) == 1500
    assert server.request_count == 1500 + 1195


# Going on.


async def test_a_second_run_asks_only_what_is_missing(
    client: AsyncChatKore, server: ChatKoreServer, place: Path
) -> None:
    """What has a line is not asked again, a failure neither; requests that were added to the input are."""
    server.respond_with(lambda asked: error(400) if number_of(asked) == "1" else echo(asked))
    out = place / "out.jsonl"
    await run_batch(client, BytesIO(requests(3)), out)
    before = out.read_bytes()
    server.clear()
    server.respond_with(echo)
    summary = await run_batch(client, BytesIO(requests(3)), out)
    assert (summary.total, summary.completed, summary.failed, summary.resumed) == (3, 2, 1, 3)
    assert server.request_count == 0
    assert out.read_bytes() == before
    summary = await run_batch(client, BytesIO(requests(5)), out)
    assert (summary.completed, summary.failed, summary.resumed) == (4, 1, 3)
    assert sorted(map(number_of, server.requests)) == ["3", "4"]
    assert out.read_bytes().startswith(before)


async def test_failures_are_retried_when_asked_to(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """`retry_failed` replaces the lines of failures, and leaves the others as they are."""
    server.respond_with(lambda asked: error(400) if number_of(asked) in "13" else echo(asked))
    out = place / "out.jsonl"
    await run_batch(client, BytesIO(requests(5)), out)
    out.chmod(0o640)
    before = results(out)
    server.clear()
    server.respond_with(lambda asked: error(400) if number_of(asked) == "3" else echo(asked))
    summary = await run_batch(client, BytesIO(requests(5)), out, retry_failed=True)
    assert (summary.completed, summary.failed, summary.resumed) == (4, 1, 3)
    assert sorted(map(number_of, server.requests)) == ["1", "3"]
    after = results(out)
    assert {name: after[name] for name in ("r0", "r2", "r4")} == {name: before[name] for name in ("r0", "r2", "r4")}
    assert after["r1"]["response"]["status_code"] == 200
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert files_in(place) == {"out.jsonl"}
    # A request that failed may be mended before it is retried.
    summary = await run_batch(
        client,
        BytesIO(jsonl(*(request(number, **({"seed": 1} if number == 3 else {})) for number in range(5)))),
        out,
        retry_failed=True,
    )
    assert summary.total == 5
    assert len(results(out)) == 5


async def test_a_link_stays_a_link(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """An output that is a link to another place is replaced there."""
    (place / "there").mkdir()
    (place / "out.jsonl").symlink_to(place / "there" / "real.jsonl")
    server.always(error(400))
    await run_batch(client, BytesIO(requests(2)), place / "out.jsonl")
    server.always(completion("x"))
    await run_batch(client, BytesIO(requests(2)), place / "out.jsonl", retry_failed=True)
    assert (place / "out.jsonl").is_symlink()
    assert files_in(place / "there") == {"real.jsonl"}
    assert len(results(place / "there" / "real.jsonl")) == 2


async def test_an_output_of_openai_is_gone_on_with(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """Lines that OpenAI wrote count, by their `custom_id`."""
    server.respond_with(echo)
    theirs = {"id": "batch_req_wnaDys", "custom_id": "r1", "response": {"status_code": 200, "body": {}}, "error": None}
    failed = {"id": "batch_req_x", "custom_id": "r2", "response": None, "error": {"code": "batch_expired"}}
    (place / "out.jsonl").write_bytes(jsonl(theirs, failed))
    summary = await run_batch(client, BytesIO(requests(3)), place / "out.jsonl")
    assert (summary.completed, summary.failed, summary.resumed) == (2, 1, 2)
    assert (await run_batch(client, BytesIO(requests(3)), place / "out.jsonl", retry_failed=True)).ok
    assert sorted(map(number_of, server.requests)) == ["0", "2"]


async def test_a_torn_line_is_cut_off_wherever_it_was_torn(
    client: AsyncChatKore, server: ChatKoreServer, place: Path
) -> None:
    """Whatever of a last line is there, or zeros in its place, the run goes on, and no line is lost or doubled."""
    server.respond_with(echo)
    out, data = place / "out.jsonl", requests(2)
    await run_batch(client, BytesIO(data), out)
    first, second = out.read_bytes().splitlines(keepends=True)
    server.clear()
    server.respond_with(echo)
    for cut in [*range(0, len(second), 23), len(second) - 2, len(second) - 1]:
        for zeros in (b"", b"\0" * 5):
            out.write_bytes(first + second[:cut] + zeros)
            summary = await run_batch(client, BytesIO(data), out)
            whole = cut == len(second) - 1 and not zeros
            assert summary.resumed == 1 + whole
            assert out.read_bytes().splitlines(keepends=True) == [first, second]
    assert server.request_count > 10


# What is refused, before the first request.


async def refused(client: AsyncChatKore, source: Any, out: Path, **options: Any) -> tuple[str, ...]:
    """Run a batch that is refused, which asks nothing and leaves the output as it was."""
    before = content(out)
    with pytest.raises(BatchError) as caught:
        await run_batch(client, BytesIO(source) if isinstance(source, bytes) else source, out, **options)
    assert content(out) == before
    assert "\n" not in str(caught.value)
    assert content(out.parent / f".{out.name}.rewritten") is None
    return caught.value.faults or (str(caught.value),)


async def test_malformed_lines_are_told_with_their_numbers(
    client: AsyncChatKore, server: ChatKoreServer, place: Path
) -> None:
    """The first handful of them, each with its reason, before anything is asked."""
    lines = [
        jsonl(request(0)),
        b"\n",
        b"nonsense\n",
        jsonl({"custom_id": "a"}),
        jsonl(request(0)),
        jsonl(request(1, messages=[])),
    ]
    faults = await refused(client, b"".join(lines), place / "out.jsonl")
    assert [fault.partition(":")[0] for fault in faults] == [f"the input, line {number}" for number in (3, 4, 5, 6)]
    assert "not JSON" in faults[0]
    assert "$.method: it is required" in faults[1]
    assert "custom_id 'r0' has a line already" in faults[2]
    assert "$.body.messages: at least one" in faults[3]
    assert server.request_count == 0
    assert files_in(place) == set()


async def test_many_faults_are_not_all_told(client: AsyncChatKore, place: Path) -> None:
    """A file of another kind does not fill the screen."""
    for data, old in ((b"x\n" * 1000, b""), (requests(1), b'{"custom_id": "r0"}\n' * 1000)):
        (place / "out.jsonl").write_bytes(old)
        assert len(await refused(client, data, place / "out.jsonl")) == HANDFUL
    (place / "out.jsonl").write_bytes(answers(range(100)))
    assert len(await refused(client, requests(1), place / "out.jsonl")) == HANDFUL


def answers(numbers: Any, **body: Any) -> bytes:
    """An output with answers to these requests."""
    tasks = [read_task(json.dumps(request(number, **body)).encode()) for number in numbers]
    return b"".join(answer_line(task.id, task.custom_id, ChatCompletion()) for task in tasks)


async def test_an_output_that_answers_other_requests(client: AsyncChatKore, place: Path) -> None:
    """Results of requests that the input lacks, or has changed, are not mixed with others."""
    out = place / "out.jsonl"
    out.write_bytes(answers([0, 7]) + answers([1], seed=1))
    faults = await refused(client, requests(3), out)
    assert len(faults) == 2
    assert faults[0].endswith("out.jsonl, line 2: custom_id 'r7' is not in the input")
    assert faults[1].endswith("line 3: custom_id 'r1' was answered, and has another request now")
    task = read_task(json.dumps(request(1, seed=1)).encode())
    out.write_bytes(failure_line(task.id, "r1", InvalidRequestError("no")) + b'{"id":"batch_req_0')
    assert "failed, and has another request now" in (await refused(client, requests(3), out))[0]
    out.write_bytes(failure_line(task.id, "r9", InvalidRequestError("no")))
    assert "'r9' is not in the input" in (await refused(client, requests(3), out, retry_failed=True))[0]


async def test_an_output_with_doubled_lines(client: AsyncChatKore, place: Path) -> None:
    """Two lines for one request are somebody else's doing, and for them to sort out."""
    out = place / "out.jsonl"
    out.write_bytes(answers([0, 1, 0]))
    assert "line 3: custom_id 'r0' has a line already" in (await refused(client, requests(3), out))[0]
    theirs = {"id": "batch_req_x", "custom_id": "r0", "response": {"status_code": 200}, "error": None}
    out.write_bytes(answers([0]) + jsonl(theirs))
    assert "'r0' has two lines in the output" in (await refused(client, requests(3), out))[0]
    out.write_bytes(answers([0]) + jsonl(theirs | {"error": {}}))
    assert "two lines" in (await refused(client, requests(3), out, retry_failed=True))[0]


@pytest.mark.parametrize("ends", [b"\n", b""])
async def test_a_file_that_is_no_output(client: AsyncChatKore, place: Path, ends: bytes) -> None:
    """A file of another kind is not written to, an input in the place of the output neither, nor is its end cut off."""
    for content in (b"Dear diary", jsonl(request(0))[:-1], b"\x89PNG", b'{"id":"other"'):
        (place / "out.jsonl").write_bytes(content + ends)
        [fault] = await refused(client, requests(1), place / "out.jsonl")
        assert "line 1 is no result" in fault


async def test_the_input_as_output(client: AsyncChatKore, place: Path) -> None:
    """One file cannot be both."""
    (place / "in.jsonl").write_bytes(b"")
    (place / "link.jsonl").hardlink_to(place / "in.jsonl")
    assert "is the input" in (await refused(client, place / "in.jsonl", place / "link.jsonl"))[0]


async def test_an_output_that_cannot_be_written(client: AsyncChatKore, place: Path) -> None:
    """A directory, a device, a place that does not exist or lets nobody write are refused with the system's words."""
    assert "cannot be written: Is a directory" in str(await caught(client, place))
    assert "No such file or directory" in str(await caught(client, place / "no" / "out.jsonl"))
    assert "is no regular file" in str(await caught(client, Path("/dev/null")))
    if content(Path("/proc/version")):
        assert "cannot be written" in str(await caught(client, Path("/proc/version")))


async def caught(client: AsyncChatKore, out: Path) -> BatchError:
    with pytest.raises(BatchError) as raised:
        await run_batch(client, BytesIO(requests(1)), out)
    return raised.value


async def test_an_input_that_cannot_be_read(client: AsyncChatKore, place: Path) -> None:
    """A missing file, a directory, and a gzip that ends too soon or is damaged."""
    for path in (place / "no.jsonl", place):
        assert "cannot be read" in (await refused(client, path, place / "out.jsonl"))[0]
    pipe = os.pipe()
    with os.fdopen(pipe[0], "rb", buffering=0) as reader, os.fdopen(pipe[1], "wb"):
        assert "cannot be read" in (await refused(client, reader, place / "out.jsonl"))[0]
    packed = gzip.compress(requests(1000))
    for damaged in (packed[:-50], packed[:50] + b"xxxxxxxx" + packed[58:]):
        assert "cannot be read" in (await refused(client, damaged, place / "out.jsonl"))[0]
    assert files_in(place) == set()


async def test_two_runs_on_one_output(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """The second run is refused while the first one writes, and may go on after it."""
    go_on, out = asyncio.Event(), place / "out.jsonl"

    async def respond(asked: RecordedRequest) -> Reply:
        await go_on.wait()
        return echo(asked)

    server.respond_with(respond)
    first = asyncio.create_task(run_batch(client, BytesIO(requests(2)), out))
    await server.wait_for_requests(2, timeout=PATIENCE)
    for retry_failed in (False, True):
        assert "another run writes to" in (await refused(client, requests(2), out, retry_failed=retry_failed))[0]
    go_on.set()
    assert (await first).completed == 2
    assert (await run_batch(client, BytesIO(requests(2)), out)).resumed == 2


async def test_a_run_that_replaces_failures_keeps_its_lock(
    client: AsyncChatKore, server: ChatKoreServer, place: Path
) -> None:
    """The lock goes over to the new file together with the name."""
    out = place / "out.jsonl"
    server.always(error(400))
    await run_batch(client, BytesIO(requests(2)), out)
    go_on = asyncio.Event()

    async def respond(asked: RecordedRequest) -> Reply:
        await go_on.wait()
        return echo(asked)

    server.clear()
    server.respond_with(respond)
    first = asyncio.create_task(run_batch(client, BytesIO(requests(2)), out, retry_failed=True))
    await server.wait_for_requests(2, timeout=PATIENCE)
    assert "another run" in (await refused(client, requests(2), out))[0]
    go_on.set()
    assert (await first).ok


@pytest.mark.parametrize("concurrency", [0, True, "8"])
async def test_an_impossible_concurrency(client: AsyncChatKore, place: Path, concurrency: Any) -> None:
    """It is told before a file is touched."""
    with pytest.raises(ConfigurationError):
        await run_batch(client, place / "no.jsonl", place / "out.jsonl", concurrency=concurrency)
    assert files_in(place) == set()


# What goes wrong on the way.


async def test_an_input_that_is_changed_while_it_is_read(
    client: AsyncChatKore, server: ChatKoreServer, place: Path
) -> None:
    """What was asked by then is written; then the run ends, and a second one sees what is missing."""
    path, out = place / "in.jsonl", place / "out.jsonl"
    for change in (b"", jsonl(request("x"))):
        path.write_bytes(requests(700))
        out.unlink(missing_ok=True)

        def respond(asked: RecordedRequest, change: bytes = change) -> Reply:
            if number_of(asked) == "0":
                path.write_bytes(requests(10) + change)
            return echo(asked)

        server.clear()
        server.respond_with(respond)
        with pytest.raises(BatchError, match="was changed while it was read"):
            await run_batch(client, path, out, concurrency=2)
        assert len(results(out)) == server.request_count < 700
    path.write_bytes(requests(700))
    assert (await run_batch(client, path, out)).completed == 700


async def test_lines_added_while_it_runs(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """Requests that are appended meanwhile are not asked by this run, and it says so."""
    path = place / "in.jsonl"
    path.write_bytes(requests(1))

    def respond(asked: RecordedRequest) -> Reply:
        with path.open("ab") as more:
            more.write(jsonl(request(1)))
        return echo(asked)

    server.respond_with(respond)
    summary = await run_batch(client, path, place / "out.jsonl")
    assert summary.total == 1
    assert (await run_batch(client, path, place / "out.jsonl")).total == 2


def test_an_input_that_grew_or_lost_its_sense() -> None:
    """Should a file change without its time and size telling, nothing is asked that was not looked at."""

    class Changed(Input):
        def check(self) -> None:
            pass

    plan = Plan(retry_failed=False)
    plan.add_request("line 1", jsonl(request(0)))
    grown = _slices(Changed(BytesIO(requests(3))), plan)
    assert [task.custom_id for tasks in grown for task in tasks] == ["r0"]
    with pytest.raises(BatchError, match="line 1: it is not JSON"):
        list(_slices(Changed(BytesIO(b"nonsense")), plan))


async def test_a_client_that_is_closed_stops_the_batch(
    client: AsyncChatKore, server: ChatKoreServer, place: Path
) -> None:
    """What hinders every request is raised, not written a million times; what is finished is kept."""

    async def respond(asked: RecordedRequest) -> Reply:
        if number_of(asked) == "5":
            await client.close()
        return echo(asked)

    server.respond_with(respond)
    with pytest.raises(ConfigurationError, match="closed"):
        await run_batch(client, BytesIO(requests(50)), place / "out.jsonl", concurrency=1)
    lines = results(place / "out.jsonl")
    assert lines.keys() >= {"r0", "r1", "r2", "r3", "r4"}
    assert all("closed" in str(line) for name, line in lines.items() if name not in {f"r{n}" for n in range(5)})


async def test_a_key_that_cannot_be_had_stops_the_batch(server: ChatKoreServer, place: Path) -> None:
    """What a key callable raises is its caller's, and comes out as it is."""

    def key() -> str:
        raise LookupError("no vault")

    async with AsyncChatKore(api_key=key, base_url=server.base_url) as client:
        with pytest.raises(LookupError, match="no vault"):
            await run_batch(client, BytesIO(requests(5)), place / "out.jsonl")
    assert (place / "out.jsonl").read_bytes() == b""


async def test_progress_that_raises_stops_the_batch(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """What is finished by then is written all the same."""
    server.respond_with(echo)

    def tell(summary: BatchSummary) -> None:
        if summary.done == 3:
            raise LookupError("no screen")

    with pytest.raises(LookupError):
        await run_batch(client, BytesIO(requests(50)), place / "out.jsonl", concurrency=5, on_progress=tell)
    assert len(results(place / "out.jsonl")) >= 3


async def test_a_cancelled_run_can_be_gone_on_with(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """Wherever it is cancelled, once or again and again, the output is whole lines, and the next run completes it."""
    asyncio.get_running_loop().set_debug(False)
    server.respond_with(echo)
    data, out = requests(40), place / "out.jsonl"
    turns, done = 0, 0
    while done < 40:
        turns += 1 + turns // 3
        task = asyncio.create_task(run_batch(client, BytesIO(data), out, concurrency=3))
        for _ in range(turns):
            if task.done():
                break
            await asyncio.sleep(0)
        task.cancel()
        while turns % 2 and not task.done():
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.result().ok
        found = len(results(out)) if out.exists() else 0
        assert found >= done
        done = found
    assert (await run_batch(client, BytesIO(data), out)).resumed == 40


class Instant:
    """A client whose calls take no time, so that several are finished when the first one is written."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask
        self.chat = self.completions = self

    def map(self, requests: Any, /, *, concurrency: int) -> MapResults:
        return MapResults(self._ask, requests, concurrency=concurrency, ordered=False, on_error="return")


async def test_what_is_finished_is_written_whatever_stops_the_run(place: Path) -> None:
    """Results that wait for their turn are billed: they are written before the run ends; what is none is not."""

    async def ask(**params: Any) -> ChatCompletion:
        if params["messages"][0]["content"] == "Hello 3":
            raise ConfigurationError("closed")
        return ChatCompletion()

    def tell(summary: BatchSummary) -> None:
        if summary.done == 1:
            raise LookupError

    with pytest.raises(LookupError):
        await run_batch(Instant(ask), BytesIO(requests(9)), place / "out.jsonl", concurrency=5, on_progress=tell)
    assert results(place / "out.jsonl").keys() == {"r0", "r1", "r2", "r4"}


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancelled_run_tells_how_far_it_came(place: Path, turns: int) -> None:
    """The last summary before the end counts what was written on the way out, too: it is what the output has."""
    told: list[BatchSummary] = []
    asked = 0
    gate = asyncio.Event()

    async def ask(**_: Any) -> ChatCompletion:
        nonlocal asked
        asked += 1
        await gate.wait()
        return ChatCompletion()

    data, out = BytesIO(requests(9)), place / "out.jsonl"
    run = asyncio.create_task(run_batch(Instant(ask), data, out, concurrency=5, on_progress=told.append))
    while asked < 5:  # noqa: ASYNC110 - files are read in a thread
        await asyncio.sleep(0)
    gate.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    run.cancel()
    await asyncio.wait([run])
    assert told[-1].done == len(results(out))


async def test_an_answer_that_no_server_gave(place: Path) -> None:
    """A client of another kind may know no status, no usage and no JSON: the line says what there is."""
    answer = ChatCompletion(choices=[Choice(message=ChatCompletionMessage(content="Hi"))])
    answer._raw = b'{"huge": ' + b"9" * 5000 + b"}"

    async def ask(**_: Any) -> ChatCompletion:
        return answer

    summary = await run_batch(Instant(ask), BytesIO(requests(1)), place / "out.jsonl")
    assert (summary.completed, summary.prompt_tokens) == (1, 0)
    response = results(place / "out.jsonl")["r0"]["response"]
    assert (response["status_code"], response["request_id"]) == (200, "")
    assert response["body"]["choices"][0]["message"]["content"] == "Hi"


FULL_DISK = """
import asyncio, resource, sys
from chatkore_async import AsyncChatKore
from chatkore_async.batch import run_batch
url, source, out, most = sys.argv[1:]
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), before[1]))
async def main():
    async with AsyncChatKore(api_key="k", base_url=url) as client:
        try:
            await run_batch(client, source, out, concurrency=4, retry_failed="retry" in out)
        except Exception as error:
            print(type(error).__name__, error)
asyncio.run(main())
resource.setrlimit(resource.RLIMIT_FSIZE, before)
"""


async def scripted(script: str, *arguments: object) -> str:
    """Run a script in an interpreter of its own, and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", script, *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"},
    )
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate()
    assert (process.returncode, err.decode()) == (0, "")
    return out.decode()


async def test_a_full_disk(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """The system's error comes out, with the file's name; what was written is kept, and with more room it goes on."""
    server.respond_with(echo)
    path, out = place / "in.jsonl", place / "out.jsonl"
    path.write_bytes(requests(50))
    assert await scripted(FULL_DISK, server.base_url, path, out, 5000) == (
        f"OSError [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{out}'\n"
    )
    assert out.stat().st_size == 5000
    whole = out.read_bytes().count(b"\n")
    assert 5 < whole < 20
    summary = await run_batch(client, path, out)
    assert (summary.resumed, summary.completed) == (whole, 50)
    assert len(results(out)) == 50


async def test_a_disk_too_full_to_replace_failures(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """When the new file cannot be written, the old one stays, and nothing is asked."""
    server.respond_with(lambda asked: error(400) if number_of(asked) == "0" else echo(asked))
    path, out = place / "in.jsonl", place / "retry.jsonl"
    path.write_bytes(requests(50))
    await run_batch(client, path, out)
    before = out.read_bytes()
    said = await scripted(FULL_DISK, server.base_url, path, out, 5000)
    assert said.startswith(f"BatchError {out} cannot be written anew: ")
    assert out.read_bytes() == before
    assert files_in(place) == {"in.jsonl", "retry.jsonl"}
    assert server.request_count == 50


async def test_the_files_do_not_stop_the_loop(client: AsyncChatKore, server: ChatKoreServer, place: Path) -> None:
    """While large files are looked through, other tasks have their turns."""
    asyncio.get_running_loop().set_debug(False)
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    (place / "out.jsonl").write_bytes(answers(range(5000)))
    ticking = asyncio.create_task(tick())
    summary = await run_batch(client, BytesIO(requests(5000)), place / "out.jsonl")
    ticking.cancel()
    assert summary.resumed == 5000
    assert turns > 20
